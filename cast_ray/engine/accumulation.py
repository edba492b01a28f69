"""A step's images through the network in parts, with the loss and the gradients of all of them at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from cast_ray.models.network import Output, TrainedNetwork
from cast_ray.records import Predictions, Targets


class PartedForward:
    """The forward and backward pass of one step, holding the activations of one part of its images at a time.

    Gradients of parts cannot simply be added up here: the loss divides by counts of the whole step, and the pixel
    contrast compares pixels of all its images (a part of one image has no other image at all). So the outputs of all
    parts are computed first, without a graph; the loss is taken on them together; then each part runs again with its
    graph and receives the gradients of its outputs. Equal to one pass over all images, for one more forward pass.

    Args:
        wrapped: the network as the workers share it (DistributedDataParallel or bare).
        network: the same, bare.
        num_parts: 1: an ordinary forward pass.
        autocast: a fresh autocast context.
        seed: of the network's own random numbers in this step; each part draws the same ones both times.

    Source: Gao et al. 2021 (gradient caching).
    """

    def __init__(self, wrapped: nn.Module, network: TrainedNetwork, num_parts: int, autocast: Any, seed: int):
        self.wrapped, self.network, self.num_parts = wrapped, network, num_parts
        self.autocast, self.seed = autocast, seed
        self.parts: list[tuple[torch.Tensor, torch.Tensor | None, list[Targets]]] = []
        self.joined: list[torch.Tensor] = []

    def __call__(self, weak: torch.Tensor, strong: torch.Tensor | None, targets: list[Targets]) -> Output:
        """Outputs of all images, differentiable; with several parts without the encoder's feature maps."""
        if self.num_parts == 1:
            torch.manual_seed(self.seed)
            with self.autocast():
                return self.wrapped(weak, strong, targets)
        strong_parts = strong.chunk(self.num_parts) if strong is not None else [None] * self.num_parts
        left = iter(targets)
        self.parts = [(w, s, list(islice(left, len(w)))) for w, s in zip(weak.chunk(self.num_parts), strong_parts)]
        with torch.no_grad():
            outputs = [self._run(self.network, i) for i in range(len(self.parts))]
        tensors = [loss_inputs(output) for output in outputs]
        self.joined = [torch.cat(same).requires_grad_() for same in zip(*tensors)]
        return _rebuilt(outputs[0], self.joined)

    def backward(self) -> None:
        """Runs the parts again and sends the gradients of their outputs to the weights; after the loss's backward."""
        if self.num_parts == 1:
            return
        start = 0
        for i, (weak, _, _) in enumerate(self.parts):
            stop = start + len(weak)
            with self._without_sync(last=i == len(self.parts) - 1):
                outputs = loss_inputs(self._run(self.wrapped, i))
                # An output that no term read gets zeros: DDP waits for every weight that it saw in the graph.
                pairs = [
                    (out, torch.zeros_like(out) if whole.grad is None else whole.grad[start:stop])
                    for out, whole in zip(outputs, self.joined)
                    if out.requires_grad
                ]
                torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
            start = stop

    def _run(self, network: nn.Module, index: int) -> Output:
        torch.manual_seed(self.seed + index)
        with self.autocast():
            return network(*self.parts[index])

    def _without_sync(self, last: bool) -> AbstractContextManager[None]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()


def loss_inputs(output: Output) -> list[torch.Tensor]:
    """What a loss may read of an output, in a fixed order."""
    predictions = output.predictions
    found = [*predictions.class_logits, *predictions.mask_logits, *predictions.auxiliary.values()]
    return found + [z for z in (output.z_weak, output.z_strong) if z is not None]


def _rebuilt(like: Output, tensors: list[torch.Tensor]) -> Output:
    """The inverse of `loss_inputs`, for an output of the same structure."""
    left = iter(tensors)
    predictions = Predictions(
        class_logits=[next(left) for _ in like.predictions.class_logits],
        mask_logits=[next(left) for _ in like.predictions.mask_logits],
        features={},
        auxiliary={name: next(left) for name in like.predictions.auxiliary},
    )
    return Output(
        predictions,
        next(left) if like.z_weak is not None else None,
        next(left) if like.z_strong is not None else None,
    )
