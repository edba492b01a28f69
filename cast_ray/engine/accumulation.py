"""A step's images through the network in parts, with the loss and the gradients of all of them at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.models.cast_network import Output, TrainedNetwork


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
        self.parts: list[tuple[Any, ...]] = []
        self.joined: list[torch.Tensor] = []

    def __call__(
        self,
        weak: torch.Tensor,
        strong: torch.Tensor | None,
        targets: list[Targets],
        strong_from: int | None = None,
    ) -> Output:
        """Outputs of all images, differentiable; with several parts without the encoder's feature maps.

        Args:
            strong_from: see `CastNetwork`; None: the network, which may not know it, is not told.
        """
        if self.num_parts == 1:
            torch.manual_seed(self.seed)
            with self.autocast():
                return self.wrapped(weak, strong, targets, *_given(strong_from))
        strong_parts = strong.chunk(self.num_parts) if strong is not None else [None] * self.num_parts
        left, self.parts, start = iter(targets), [], 0
        for w, s in zip(weak.chunk(self.num_parts), strong_parts):
            first = None if strong_from is None else min(max(strong_from - start, 0), len(w))
            self.parts.append((w, s, list(islice(left, len(w))), *_given(first)))
            start += len(w)
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
        for i, (weak, *_) in enumerate(self.parts):
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


def _given(value: int | None) -> tuple[int, ...]:
    return () if value is None else (value,)


def loss_inputs(output: Output) -> list[torch.Tensor]:
    """What a loss may read of an output, in a fixed order."""
    found = [z for z in (output.z_weak, output.z_strong) if z is not None]
    for predictions in (output.predictions, output.supervised):
        if predictions is not None:
            found += [*predictions.class_logits, *predictions.mask_logits, *predictions.auxiliary.values()]
    return found


def _rebuilt(like: Output, tensors: list[torch.Tensor]) -> Output:
    """The inverse of `loss_inputs`, for an output of the same structure."""
    left = iter(tensors)

    def rebuilt(predictions: Predictions) -> Predictions:
        return Predictions(
            class_logits=[next(left) for _ in predictions.class_logits],
            mask_logits=[next(left) for _ in predictions.mask_logits],
            features={},
            auxiliary={name: next(left) for name in predictions.auxiliary},
        )

    z_weak, z_strong = (next(left) if z is not None else None for z in (like.z_weak, like.z_strong))
    predictions = rebuilt(like.predictions)
    return Output(predictions, z_weak, z_strong, rebuilt(like.supervised) if like.supervised is not None else None)
