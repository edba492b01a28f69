"""Loss scaling of float16, whose range ends at 65504: a step that overflows is left out and counted."""

from __future__ import annotations

import torch

from cast_ray.engine.accumulation import loss_inputs
from cast_ray.engine.world import World
from cast_ray.models.cast_network import Output
from cast_ray.recipe import Precision

MAX_SKIPPED_IN_A_ROW = 50
"""The scale of 65536 halves with each: after so many the gradients themselves are not finite."""


class LossScale:
    """torch's GradScaler, for overflow anywhere in a step, on any worker.

    GradScaler leaves out a step whose gradients overflow. A forward pass can overflow too, and its logits would then be
    refused by the matching; `overflowed` finds that first, on all workers together, and `not_finite` takes the place of
    the loss, so that every worker leaves the step out. Does nothing for other precisions than fp16.

    Args:
        precision: of the stage.
        world: the workers.
        num_skipped: of the steps before, in a resumed stage.
    """

    def __init__(self, precision: Precision, world: World, num_skipped: int = 0):
        self.world, self.num_skipped, self._in_a_row = world, num_skipped, 0
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

    def overflowed(self, output: Output) -> bool:
        """Whether the forward pass of any worker overflowed; for fp16 one copy from the device."""
        if not self.scaler.is_enabled():
            return False
        predictions = output.predictions
        logits = [*predictions.class_logits, *predictions.mask_logits]
        logits += [z for z in (output.z_weak, output.z_strong) if z is not None]
        bad = [~x.isfinite().all() for x in logits]
        # A detector's logits are -inf past its prompt.
        bad += [(x.isnan() | (x == torch.inf)).any() for x in predictions.auxiliary.values() if x.is_floating_point()]
        return bool(self.world.all_reduce_sum(torch.stack(bad).any().float()) > 0)

    @staticmethod
    def not_finite(output: Output) -> torch.Tensor:
        """A loss that makes every gradient NaN: the backward pass runs as ever, which DDP needs, and its step is left
        out.
        """
        used = [x for x in loss_inputs(output) if x.requires_grad]
        return torch.stack([x.float().sum() for x in used]).sum() * torch.nan

    def step(self, optimizer: torch.optim.Optimizer, done: int) -> bool:
        """Takes the optimiser's step `done`, whose gradients are unscaled; returns whether it was taken.

        Raises:
            FloatingPointError: MAX_SKIPPED_IN_A_ROW steps were left out one after the other.
        """
        before = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        self.scaler.step(optimizer)
        self.scaler.update()
        if not self.scaler.is_enabled() or self.scaler.get_scale() >= before:
            self._in_a_row = 0
            return True
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"float16 overflowed in {MAX_SKIPPED_IN_A_ROW} steps one after the other, up to step {done}: expected "
                "runtime.amp=bf16 or off, or a lower learning rate"
            )
        return False
