"""What a train stage tells others as it goes: the progress display, its checkpoints and a refreshed teacher."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import ray.train
import torch
from ray.train import Checkpoint
from safetensors.torch import save as save_tensors

from cast_ray.contracts.records import Batch
from cast_ray.engine.checkpoint import TrainState
from cast_ray.plan.graph import Stage
from cast_ray.runtime.worker.evaluation import POST_EVERY_S
from cast_ray.runtime.worker.online import Publisher
from cast_ray.runtime.worker.segment import Segment

logger = logging.getLogger(__name__)

PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Variable of Ray Train that is 0 on a local Ray, whose one node nobody drains; asking costs a call to an actor."""


class TimedBatches:
    """A stream of batches that adds up how long its reader waits for the next one."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.monotonic()
        try:
            return next(self.batches)
        finally:
            self.waited_s += time.monotonic() - began


class TrainProgress:
    """The callbacks of a train stage on one worker, for `engine.loop.TrainHooks`; only the first worker posts.

    Args:
        rank: rank of the worker.
        publisher: publishes the weights of a stage that refreshes its teacher.
        batches: stream of the worker's batches, which counts the time that was spent waiting for it.
        start_step: step that the stage starts or continues from.
        has_more_room: whether the group of an elastic run is to start again with more workers, the same on all of
            them.
    """

    def __init__(
        self,
        segment: Segment,
        stage: Stage,
        rank: int,
        publisher: Publisher | None,
        batches: TimedBatches,
        start_step: int,
        has_more_room: Callable[[], bool] = lambda: False,
    ):
        self.segment, self.stage, self.is_first, self.publisher = segment, stage, rank == 0, publisher
        self.post = {"stage": stage.name, "fingerprint": stage.fingerprint, "steps": stage.steps, "unit": "step"}
        self.batches, self.has_more_room = batches, has_more_room
        self.has_notices = os.environ.get(PREEMPTION_WATCHER) != "0"
        self.posted = 0.0
        self.paced = (time.monotonic(), float(start_step), 0.0)
        """When the pace was last taken, at which step, and how long had been waited for batches by then."""
        self.entries: list[dict[str, float]] = []

    def start(self) -> None:
        """Shows the stage as running from its first step on."""
        if self.is_first:
            self.segment.broker.begin.remote(self.segment.owner, self.post | {"step": int(self.paced[1])})

    def _pace(self, now: float, step: float) -> dict[str, float]:
        """Steps per second, and the share of the time that was spent waiting for batches, since the last call."""
        began, first, waited = self.paced
        self.paced = (now, step, self.batches.waited_s)
        seconds = max(now - began, 1e-9)
        return {"steps_per_s": (step - first) / seconds, "data_wait": (self.batches.waited_s - waited) / seconds}

    def on_log(self, entry: dict[str, float]) -> None:
        """Sends entries of the curve to the broker, not more often than each POST_EVERY_S and after the last step."""
        if not self.is_first:
            return
        now = time.monotonic()
        self.entries.append(entry)
        if now - self.posted > POST_EVERY_S or entry["step"] == self.stage.steps:
            self.posted = now
            facts = self.post | {k: entry[k] for k in ("step", "loss", "images_per_s")} | self._pace(now, entry["step"])
            self.segment.broker.post.remote(self.segment.owner, facts, tuple(self.entries))
            self.entries.clear()

    def on_checkpoint(self, state: TrainState) -> None:
        """Reports a checkpoint to Train, which all workers must do, and notes where it is."""
        stage, store = self.stage, self.segment.store
        name = f"{stage.fingerprint}-{state.step:08d}"
        metrics = {"step": state.step, "stage": stage.name, "loss": state.curve[-1]["loss"] if state.curve else None}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.is_first:
                state.save(folder)
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        if self.is_first:
            run = ray.train.get_context().get_experiment_name()
            logger.info("checkpoint of %s (%s) written at step %d", stage.name, self.segment.owner, state.step)
            store.note_checkpoint(stage.fingerprint, store.uri("train", run, name), state.step)
            saved = {"step": state.step, "checkpoint_time": time.time()}
            self.segment.broker.post.remote(self.segment.owner, self.post | saved)
            if self.publisher is not None:
                self.publisher.noted_checkpoint(state.step)

    def is_leaving(self) -> bool:
        """Whether a node of the workers is being drained (a spot node's notice, or `ray drain-node`), or there is room
        for more workers; the same on all of them."""
        is_drained = self.has_notices and ray.train.get_preemption_info() is not None
        return is_drained or self.has_more_room()

    def on_refresh(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Publishes the weights that label from the next window but one on."""
        if self.is_first and self.publisher is not None:
            self.publisher.publish(step, packed_weights(weights))


def packed_weights(weights: Mapping[str, torch.Tensor]) -> bytes:
    """Returns weights in the format of safetensors, copied from whatever device they are on."""
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
