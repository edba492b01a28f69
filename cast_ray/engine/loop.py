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
from cast_ray.models.cast_network import TrainedNetwork
from cast_ray.recipe import Precision, TrainConfig

LOG_EVERY_STEPS = 10


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
    """Seed of everything random in one step of one worker: the same after a resume as without one."""
    entropy = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return int(entropy) & 0x7FFF_FFFF_FFFF_FFFF


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The losses' random source in one step of one worker."""
    generator = torch.Generator(device=device)
    generator.manual_seed(step_seed(seed, step, rank))
    return generator


def train(
    network: TrainedNetwork,
    objective: Objective,
    batches: Iterator[Batch],
    config: TrainConfig,
    *,
    fingerprint: str,
    seed: int,
    world: World,
    amp: Precision = "off",
    resume: TrainState | None = None,
    on_log: Callable[[dict[str, float]], None] = lambda facts: None,
    on_checkpoint: Callable[[TrainState], None] = lambda state: None,
    on_refresh: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None,
    refresh_every_steps: int = 0,
    snapshot_every_steps: int = 0,
    on_snapshot: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None,
) -> TrainResult:
    """Trains `network` in place for `config.steps` optimiser steps.

    Args:
        network: the stage's network with its initial weights.
        objective: terms and weights of J.
        batches: this worker's batches from the resumed step on, one per step.
        fingerprint: of the stage; stored in checkpoints.
        seed: of the stage's random numbers.
        world: the workers.
        amp: precision of the forward pass. A step in which fp16 overflows is left out, of the curve too, and counted.
        resume: state to continue from.
        on_log: called on every worker each LOG_EVERY_STEPS steps with step, loss, each term, lr, images_per_s.
        on_checkpoint: called on every worker each `checkpoint_every_steps` steps, not after the last.
        on_refresh: called on every worker each `refresh_every_steps` steps (0: never), not after the last, with the
            averaged weights that are learnt, see `learnt_weights`, which are to be copied at once.
        snapshot_every_steps: 0: never.
        on_snapshot: called on the first worker each so many steps, not after the last, with the step and a copy on the
            CPU of the segmenter's weights as they would be handed on then. It cannot change the training.

    Raises:
        FloatingPointError: the loss is not finite, naming the step and the terms; or see `LossScale.step`.
        ValueError: the stream ended before the last step, or a loss refused its input (names the step).
    """
    device = world.device
    wrapped = world.wrap(network)
    optimizer = build_optimizer(network, config)
    average = WeightAverage(network, config.ema) if config.ema > 0 else None
    scale = LossScale(amp, world, resume.num_skipped if resume is not None else 0)
    start, seconds_before = 0, 0.0
    curve: list[dict[str, float]] = []
    diagnostics: list[dict[str, float]] = []
    if resume is not None:
        network.load_state_dict(resume.network)
        optimizer.load_state_dict(resume.optimizer)
        scale.scaler.load_state_dict(resume.scaler)
        if average is not None and resume.average is not None:
            average.load_state_dict(resume.average)
        start, seconds_before = resume.step, resume.seconds
        curve, diagnostics = list(resume.curve), list(resume.diagnostics)

    precise = partial(autocast, amp, device)
    names = list(objective.weights)
    every = objective.contrastive.diagnostics_every_steps if objective.contrastive else 0
    began = logged = time.monotonic()
    # A checkpoint is loaded on the CPU: what is not copied into a module or optimiser must be moved to the device.
    means_since = [means.to(device) for means in resume.recent] if resume is not None else []
    images, images_logged = 0, 0
    network.train()
    for step in range(start, config.steps):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the training stream ended at step {step} of {config.steps}")
        batch = batch.to(device)
        factor = set_lr(optimizer, step, config)
        generator = step_generator(seed, step, world.rank, device)
        network.anneal(step / config.steps)
        # A seed of its own: dropped paths must not repeat the losses' draws.
        own = step_seed(seed, step, world.rank) + 1
        forward = PartedForward(wrapped, network, min(config.accumulate, len(batch.weak)), precise, own)
        strong = batch.strong if objective.reads_strong else None
        strong_from = batch.num_labelled if objective.is_semi_strong else None
        output = forward(batch.weak, strong, batch.targets, strong_from)
        done = step + 1
        due = every > 0 and (done % every == 0 or done == config.steps)
        means, statistics, weights = None, None, objective.weights_at(step / config.steps)
        if scale.overflowed(output):
            loss = scale.not_finite(output)
        else:
            try:
                terms, statistics = objective(output, batch, step, generator, diagnose=due)
            except ValueError as error:  # for example of logits that are not finite, after a loss that was not
                if means_since:
                    _finite_means(means_since, names, step)
                raise ValueError(f"step {done}: {error}") from error
            loss, means = weighted_sum(terms, weights, world.all_reduce_sum, world.size)
        optimizer.zero_grad(set_to_none=True)
        scale.scaler.scale(loss).backward()
        forward.backward()
        scale.scaler.unscale_(optimizer)
        for together in network.clip_groups():
            nn.utils.clip_grad_norm_(together, config.clip_norm)
        if scale.step(optimizer, done):
            if network.projector is not None:
                network.projector.update_ema()
            if average is not None:
                average.update()
            assert means is not None
            means_since.append(means)
        images += len(batch.weak) * world.size
        if statistics is not None:
            diagnostics.append({"step": done} | objective.diagnose(world.all_reduce_sum(statistics), step))
        if means_since and (done % LOG_EVERY_STEPS == 0 or done == config.steps):
            now = time.monotonic()
            values = _finite_means(means_since, names, done)
            total = sum(v * weights[n] for n, v in zip(names, values))
            entry = {"step": done, "loss": total, "lr": config.lr * factor, **dict(zip(names, values))}
            entry["images_per_s"] = (images - images_logged) / max(now - logged, 1e-9)
            curve.append(entry)
            on_log(entry)
            logged, images_logged, means_since = now, images, []
        if refresh_every_steps and done % refresh_every_steps == 0 and done < config.steps:
            on_refresh(done, learnt_weights(network.trained, average))
        if snapshot_every_steps and done % snapshot_every_steps == 0 and done < config.steps and world.rank == 0:
            on_snapshot(done, _copied_weights(network, average))
        if done % config.checkpoint_every_steps == 0 and done < config.steps:
            if means_since:
                _finite_means(means_since, names, done)  # a state that cannot go on must not replace one that can
            on_checkpoint(
                TrainState(
                    fingerprint=fingerprint,
                    step=done,
                    network=network.state_dict(),
                    average=average.state_dict() if average is not None else None,
                    optimizer=optimizer.state_dict(),
                    scaler=scale.scaler.state_dict(),
                    num_skipped=scale.num_skipped,
                    curve=curve,
                    diagnostics=diagnostics,
                    recent=means_since,
                    seconds=seconds_before + time.monotonic() - began,
                )
            )
    if average is not None:
        average.write_to(network)
    if config.steps:
        network.anneal(1.0)
    seconds = time.monotonic() - began
    return TrainResult(curve, diagnostics, seconds_before + seconds, images / max(seconds, 1e-9), scale.num_skipped)


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
