"""The one training loop: every stage of CAST runs through `train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from cast_ray.contracts.records import Batch
from cast_ray.engine.accumulation import PartedForward
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.loss_scale import LossScale
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.optim import WeightAverage, averaged_weights, build_optimizer, learnt_weights, set_lr
from cast_ray.engine.world import World
from cast_ray.models.autocast import autocast
from cast_ray.models.cast_network import Output, TrainedNetwork
from cast_ray.recipe import Precision, TrainConfig

LOG_EVERY_STEPS = 10
LEAVE_LOOK_STEPS = 5


class Interrupted(RuntimeError):
    """The run was told to end, and has saved a checkpoint of its last step."""


@dataclass
class TrainResult:
    """A trained stage: the weights handed on (averaged where the recipe says so), its curves and its time."""

    curve: list[dict[str, float]]
    diagnostics: list[dict[str, float]]
    seconds: float
    images_per_s: float
    num_skipped: int = 0
    """Steps that were left out because float16 overflowed."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what a network draws in one step of one worker: the same after a resume as without one."""
    entropy = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return int(entropy) & 0x7FFF_FFFF_FFFF_FFFF


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The losses' random source in one step: the same on all workers, see `losses.joint_step`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(step_seed(seed, step, 0))
    return generator


@dataclass(frozen=True)
class TrainHooks:
    """What a training run tells others as it goes. A hook must not change the training.

    on_log: called on every worker each LOG_EVERY_STEPS steps and after the last, with step, loss, each term, lr and
    images_per_s. on_checkpoint: called on every worker each `checkpoint_every_steps` steps, not after the last.
    on_refresh: called on every worker each `refresh_every_steps` steps (0: never), not after the last, with the step
    and the averaged weights that are learnt (see `learnt_weights`), which are to be copied at once. on_snapshot: called
    on the first worker each `snapshot_every_steps` steps (0: never), not after the last, with the step and a copy on
    the CPU of the segmenter's weights as they would be handed on then. is_leaving: called on every worker each
    LEAVE_LOOK_STEPS steps, not after the last; where it is true, which it must be on all workers at once, the run saves
    a checkpoint and ends.
    """

    on_log: Callable[[dict[str, float]], None] = lambda entry: None
    on_checkpoint: Callable[[TrainState], None] = lambda state: None
    on_refresh: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None
    refresh_every_steps: int = 0
    on_snapshot: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None
    snapshot_every_steps: int = 0
    is_leaving: Callable[[], bool] = lambda: False


NO_HOOKS = TrainHooks()


@dataclass(frozen=True)
class RunSettings:
    """What one call of `train` is told beside its network, objective, data and optimisation.

    fingerprint: of the stage, stored in checkpoints; seed: of the stage's random numbers; world: the workers; amp:
    precision of the forward pass; resume: state to continue from; stop_step: the run ends after this step, as if it
    were interrupted there, and learning rate and schedules stay those of `config.steps` (None: it runs to its end);
    hooks: see `TrainHooks`.
    """

    fingerprint: str
    seed: int
    world: World
    amp: Precision = "off"
    resume: TrainState | None = None
    stop_step: int | None = None
    hooks: TrainHooks = NO_HOOKS


def train(
    network: TrainedNetwork,
    objective: Objective,
    batches: Iterator[Batch],
    config: TrainConfig,
    settings: RunSettings,
) -> TrainResult:
    """Trains `network` in place for `config.steps` optimiser steps.

    A step in which float16 overflows is left out, of the curve too, and counted.

    Args:
        network: the stage's network with its initial weights.
        objective: terms and weights of J.
        batches: this worker's batches from the resumed step on, one per step.
        config: how the weights are optimised.
        settings: the stage's identity, the workers, and where the run begins and ends.

    Raises:
        Interrupted: `hooks.is_leaving` said so; a checkpoint has been taken.
        FloatingPointError: the loss is not finite, naming the step and the terms; or see `LossScale.step`.
        ValueError: the stream ended before the last step, or a loss refused its input (names the step).
    """
    run, hooks, is_first = _Run(network, objective, config, settings), settings.hooks, settings.world.rank == 0
    stop = config.steps if settings.stop_step is None else min(settings.stop_step, config.steps)
    network.train()
    for step in range(run.start, stop):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the training stream ended at step {step} of {config.steps}")
        run.step(step, batch.to(settings.world.device))
        done = step + 1
        if entry := run.log_entry(done):
            hooks.on_log(entry)
        if done == stop:
            break
        if hooks.refresh_every_steps and done % hooks.refresh_every_steps == 0:
            hooks.on_refresh(done, learnt_weights(network.trained, run.average))
        if hooks.snapshot_every_steps and done % hooks.snapshot_every_steps == 0 and is_first:
            hooks.on_snapshot(done, _copied_weights(network, run.average))
        is_leaving = done % LEAVE_LOOK_STEPS == 0 and hooks.is_leaving()
        if is_leaving or done % config.checkpoint_every_steps == 0:
            hooks.on_checkpoint(run.state(done))
        if is_leaving:
            raise Interrupted(f"saved after step {done} of {config.steps}")
    return run.finish()


class _Run:
    """The state of one call of `train` and the parts of its steps."""

    def __init__(
        self,
        network: TrainedNetwork,
        objective: Objective,
        config: TrainConfig,
        settings: RunSettings,
    ):
        self.network, self.objective, self.config = network, objective, config
        self.fingerprint, self.seed, self.world = settings.fingerprint, settings.seed, settings.world
        world, amp, resume = settings.world, settings.amp, settings.resume
        self.wrapped = world.wrap(network)
        self.optimizer = build_optimizer(network, config)
        self.average = WeightAverage(network, config.ema) if config.ema > 0 else None
        self.scale = LossScale(amp, world, resume.num_skipped if resume is not None else 0)
        self.precise = partial(autocast, amp, world.device)
        self.start, self.seconds_before = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.diagnostics: list[dict[str, float]] = []
        self.means_since: list[torch.Tensor] = []
        """Mean of each term in each step since the last entry of the curve."""
        if resume is not None:
            self._continue_from(resume)
        self.names = list(objective.weights)
        self.weights = objective.weights
        """The weights of the terms in the last step."""
        self.factor = 1.0
        """The factor of the learning rate in the last step."""
        self.images, self.images_logged = 0, 0
        self.began = self.logged = time.monotonic()

    def _continue_from(self, state: TrainState) -> None:
        self.network.load_state_dict(state.network)
        self.optimizer.load_state_dict(state.optimizer)
        self.scale.scaler.load_state_dict(state.scaler)
        if self.average is not None and state.average is not None:
            self.average.load_state_dict(state.average)
        self.start, self.seconds_before = state.step, state.seconds
        self.curve, self.diagnostics = list(state.curve), list(state.diagnostics)
        # A checkpoint is loaded on the CPU: what is not copied into a module or optimiser must be moved to the device.
        self.means_since = [means.to(self.world.device) for means in state.recent]

    def step(self, step: int, batch: Batch) -> None:
        """One optimiser step on a batch that is on the device."""
        self.factor = set_lr(self.optimizer, step, self.config)
        progress = step / self.config.steps
        self.network.anneal(progress)
        self.weights = self.objective.weights_at(progress)
        generator = step_generator(self.seed, step, self.world.device)
        forward = self._forward(step, batch)
        strong = batch.strong if self.objective.reads_strong else None
        strong_from = batch.num_labelled if self.objective.is_semi_strong else None
        output = forward(batch.weak, strong, batch.targets, strong_from)
        loss, means, statistics = self._loss(output, batch, step, generator)
        if self._update(forward, loss, step + 1):
            assert means is not None
            self.means_since.append(means)
        self.images += len(batch.weak) * self.world.size
        if statistics is not None:
            facts = self.objective.diagnose(self.world.all_reduce_sum(statistics), step)
            self.diagnostics.append({"step": step + 1} | facts)

    def _forward(self, step: int, batch: Batch) -> PartedForward:
        # A seed of its own: dropped paths must not repeat the losses' draws.
        seed = step_seed(self.seed, step, self.world.rank) + 1
        num_parts = min(self.config.accumulate, len(batch.weak))
        return PartedForward(self.wrapped, self.network, num_parts, self.precise, seed)

    def _loss(
        self, output: Output, batch: Batch, step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The scalar to differentiate; the mean of each term, None after an overflow; statistics where they are due."""
        if self.scale.overflowed(output):
            return self.scale.not_finite(output), None, None
        done = step + 1
        every = self.objective.contrastive.diagnostics_every_steps if self.objective.contrastive else 0
        due = every > 0 and (done % every == 0 or done == self.config.steps)
        try:
            terms, statistics = self.objective(output, batch, step, generator, diagnose=due)
        except ValueError as error:  # for example of logits that are not finite, after a loss that was not
            if self.means_since:
                _finite_means(self.means_since, self.names, step)
            # With its traceback, so that a debugger stops in the loss and not here.
            raise ValueError(f"step {done}: {error}").with_traceback(error.__traceback__) from None
        loss, means = weighted_sum(terms, self.weights, self.world.all_reduce_sum, self.world.size)
        return loss, means, statistics

    def _update(self, forward: PartedForward, loss: torch.Tensor, done: int) -> bool:
        """The backward pass and the optimiser's step; whether the weights were changed, which an overflow prevents."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.scaler.scale(loss).backward()
        forward.backward()
        self.scale.scaler.unscale_(self.optimizer)
        for together in self.network.clip_groups():
            nn.utils.clip_grad_norm_(together, self.config.clip_norm)
        if not self.scale.step(self.optimizer, done):
            return False
        if self.network.projector is not None:
            self.network.projector.update_ema()
        if self.average is not None:
            self.average.update()
        return True

    def log_entry(self, done: int) -> dict[str, float] | None:
        """Adds an entry to the curve and returns it, where one is due."""
        if not self.means_since or (done % LOG_EVERY_STEPS and done != self.config.steps):
            return None
        now = time.monotonic()
        values = _finite_means(self.means_since, self.names, done)
        total = sum(v * self.weights[n] for n, v in zip(self.names, values))
        entry = {"step": done, "loss": total, "lr": self.config.lr * self.factor, **dict(zip(self.names, values))}
        entry["images_per_s"] = (self.images - self.images_logged) / max(now - self.logged, 1e-9)
        self.curve.append(entry)
        self.logged, self.images_logged, self.means_since = now, self.images, []
        return entry

    def state(self, done: int) -> TrainState:
        """What continues this run after `done` steps; its tensors are the live ones."""
        if self.means_since:
            # A state that cannot be continued must not replace one that can.
            _finite_means(self.means_since, self.names, done)
        return TrainState(
            fingerprint=self.fingerprint,
            step=done,
            network=self.network.state_dict(),
            average=self.average.state_dict() if self.average is not None else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scale.scaler.state_dict(),
            num_skipped=self.scale.num_skipped,
            curve=self.curve,
            diagnostics=self.diagnostics,
            recent=self.means_since,
            seconds=self.seconds_before + time.monotonic() - self.began,
        )

    def finish(self) -> TrainResult:
        """Puts the averaged weights into the network."""
        if self.average is not None:
            self.average.write_to(self.network)
        if self.config.steps:
            self.network.anneal(1.0)
        seconds = time.monotonic() - self.began
        images_per_s = self.images / max(seconds, 1e-9)
        return TrainResult(
            self.curve, self.diagnostics, self.seconds_before + seconds, images_per_s, self.scale.num_skipped
        )


def _copied_weights(network: TrainedNetwork, average: WeightAverage | None) -> dict[str, torch.Tensor]:
    """A copy on the CPU of what a stage that ended here would hand on."""
    weights = averaged_weights(network.trained, average)
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def _finite_means(recent: list[torch.Tensor], names: list[str], done: int) -> list[float]:
    """Mean of each term over the last steps, the last of them `done`; their only device-to-host copy.

    Raises:
        FloatingPointError: a term is not finite; names the first such step and its terms.
    """
    rows = torch.stack(recent).cpu()
    bad = (~rows.isfinite().all(1)).nonzero()
    if len(bad):
        first = int(bad[0])
        step = done - len(recent) + first + 1
        raise FloatingPointError(f"the loss is not finite at step {step}: {dict(zip(names, rows[first].tolist()))}")
    return rows.mean(0).tolist()
