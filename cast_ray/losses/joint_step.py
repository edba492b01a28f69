"""A step's images on all workers, in one order, so that random draws belong to an image and not to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Gather(Protocol):
    """Concatenates equal-sized tensors of all workers along dim 0 in rank order; gradients flow back to each."""

    rank: int
    size: int

    def __call__(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class JointStep:
    """Where the images of one worker stand among those of all, as one worker would hold them: D_l first, then D_u.

    Every worker has an equal part of D_l and of D_u (`data/sampling.py`). It draws random numbers for the images of
    all workers from the same generator and keeps those of its own images. So what is drawn for an image depends on the
    seed, the step and the image's place, and neither on the worker that holds it nor on the number of workers. The
    shape of a draw is that of the joint step, because on a GPU the shape decides the numbers.

    num_labelled, num_images: of this worker; gather: joins tensors of all workers; None: there is no other worker.
    """

    num_labelled: int
    num_images: int
    gather: Gather | None = None

    @property
    def size(self) -> int:
        """Number of workers."""
        return 1 if self.gather is None else self.gather.size

    @property
    def labelled(self) -> JointStep:
        """The same step without the images of D_u."""
        return JointStep(self.num_labelled, self.num_labelled, self.gather)

    @property
    def num_joint(self) -> int:
        """Images of all workers."""
        return self.num_images * self.size

    @cached_property
    def rows(self) -> list[int]:
        """Place of each image of this worker in the joint step, rising."""
        rank = 0 if self.gather is None else self.gather.rank
        num_unlabelled = self.num_images - self.num_labelled
        of_labelled = (rank * self.num_labelled + i for i in range(self.num_labelled))
        first = self.size * self.num_labelled + rank * num_unlabelled
        return [*of_labelled, *range(first, first + num_unlabelled)]

    @property
    def runs(self) -> list[slice]:
        """This worker's images in parts whose places in the joint step follow each other."""
        if self.size == 1 or self.num_labelled in (0, self.num_images):
            return [slice(0, self.num_images)]
        return [slice(0, self.num_labelled), slice(self.num_labelled, self.num_images)]

    def own(self, joint: Tensor) -> Tensor:
        """The entries [B, ...] of this worker's images of those of all images."""
        return joint if self.size == 1 else joint[self.rows]

    def rand(self, *shape: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Uniform random numbers in [0, 1) for each image of this worker, float32 [B, *shape]."""
        return self.own(torch.rand(self.num_joint, *shape, device=device, generator=generator))

    def join(self, own: Tensor) -> Tensor:
        """Entries [B m, ...] of this worker's images, m each, with those of all workers in the joint order."""
        if self.gather is None or self.size == 1:
            return own
        gathered = self.gather(own)
        if len(self.runs) == 1:
            return gathered
        labelled, unlabelled = gathered.unflatten(0, (self.size, self.num_images, -1)).split(
            [self.num_labelled, self.num_images - self.num_labelled], dim=1
        )
        return torch.cat([labelled.flatten(0, 2), unlabelled.flatten(0, 2)])

    def joint_counts(self, own: Sequence[int], device: torch.device) -> np.ndarray:
        """A whole number of each image of this worker -> those of all images, int64 [num_joint].

        With several workers it costs a copy from the device.
        """
        if self.size == 1:
            return np.array(own, dtype=np.int64)
        return self.join(torch.tensor(own, device=device)).cpu().numpy()


class AnchorDraws:
    """Uniform random numbers for the anchors of each image, block by block in the order of the joint step.

    What the images of other workers would be given is drawn and thrown away.

    Args:
        step: the joint step.
        num_anchors: anchors of each image.
        rows_at_a_time: anchors of one block; each image begins a block.
    """

    def __init__(self, step: JointStep, num_anchors: int, rows_at_a_time: int, generator: torch.Generator | None):
        self.step, self.num_anchors, self.rows_at_a_time = step, num_anchors, rows_at_a_time
        self.generator = generator
        self.image, self.row = 0, 0
        """Place of the next block in the joint step."""

    def rand(self, images: slice, rows: slice, width: int, device: torch.device) -> Tensor:
        """Draws float32 [images, rows, width]; calls must come in the order of the images and rows.

        Args:
            images: of this worker.
            rows: one block of anchors, or all anchors of the images.
            width: numbers of an anchor, the same in all calls.
        """
        first, last = rows.start, min(rows.stop, self.num_anchors)
        return torch.stack(
            [self._image(self.step.rows[i], first, last, width, device) for i in range(images.start, images.stop)]
        )

    def _image(self, image: int, first: int, last: int, width: int, device: torch.device) -> Tensor:
        while (self.image, self.row) < (image, first):
            self._block(width, device)
        parts = [self._block(width, device)]
        while self.image == image and self.row < last:
            parts.append(self._block(width, device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, width: int, device: torch.device) -> Tensor:
        stop = min(self.row + self.rows_at_a_time, self.num_anchors)
        drawn = torch.rand(stop - self.row, width, device=device, generator=self.generator)
        self.image, self.row = (self.image, stop) if stop < self.num_anchors else (self.image + 1, 0)
        return drawn
