"""How much memory one worker of a stage needs, before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cast_ray.engine.accumulation import loss_inputs
from cast_ray.evaluation.efficiency import peak_memory
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import outline
from cast_ray.recipe import ContrastiveConfig, ModelConfig, TrainConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker: weights with gradients, AdamW's moments and the average; activations kept for the backward
    pass; outputs and their gradients.

    The loss's own buffers, the CUDA context and kernels' workspaces come on top: about 1 to 2 GiB on a GPU.
    """

    weights: int
    activations: int
    outputs: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.outputs

    def __str__(self) -> str:
        parts = (self.weights, self.activations, self.outputs)
        return f"{self.total / GIB:.1f} GiB (" + " + ".join(f"{part / GIB:.1f}" for part in parts) + ")"


def estimate_memory(
    model: ModelConfig,
    train: TrainConfig,
    *,
    num_classes: int,
    image_px: tuple[int, int],
    contrastive: ContrastiveConfig | None = None,
    num_workers: int = 1,
    half: bool = False,
    gradient_checkpointing: bool = False,
    semi_strong: bool = False,
) -> MemoryEstimate:
    """The memory of one worker of a train stage, from shapes alone: nothing is allocated or computed.

    Args:
        model, train: of the stage.
        num_classes: C.
        image_px: of the crop.
        contrastive: of a row with L_pxl, whose strong view passes through the encoder too; else None.
        num_workers: that share the batch.
        half: autocast to 16 bits.
        gradient_checkpointing: as `runtime.gradient_checkpointing`.
        semi_strong: whether L_semi reads the strong view of D_u, whose decoder and head then come beside those of the
            weak view where L_pxl is on.

    Raises:
        ValueError: parts of the model that do not fit each other.
    """
    labelled = -(-train.batch_labelled // num_workers)
    others = -(-train.batch_unlabelled // num_workers)
    settings = (model, num_classes, image_px, contrastive, half, gradient_checkpointing)
    per_image = _per_image(*settings, False)
    of_other = _per_image(*settings, semi_strong and contrastive is not None)
    # float32: weights, gradients, two moments and, where used, the average.
    weights = per_image.parameters * 4 * (5 if train.ema > 0 else 4)
    images = labelled + others
    at_a_time = -(-images // train.accumulate)
    # A part holds D_u first in the worst case.
    others_at_a_time = min(others, at_a_time)
    activations = others_at_a_time * of_other.activations + (at_a_time - others_at_a_time) * per_image.activations
    outputs = labelled * per_image.outputs + others * of_other.outputs
    return MemoryEstimate(weights, activations, 2 * outputs)


@lru_cache(maxsize=64)
def estimate_inference_memory(
    model: ModelConfig, *, num_classes: int, image_px: tuple[int, int], images: int, half: bool = False
) -> int:
    """Bytes that one process needs to find instances in whole images: weights, and the most that a pass holds at once.

    The pass runs on fake tensors, as in `estimate_memory`. The work after it (masks at the image's own size, a few at a
    time) takes about 100 MiB more.

    Args:
        model: settings of a student or an expert.
        num_classes: C.
        image_px: height and width of what the model is given, pixels.
        images: that pass together.
        half: autocast to 16 bits.
    """
    bare = outline(model, num_classes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        segmenter = bare.to_empty(device="cpu").eval()
        weights = sum(p.numel() * p.element_size() for p in segmenter.parameters())
        batch = torch.zeros((images, 3, *image_px), dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return weights + peak_memory(lambda: segmenter(batch), torch.device("cpu"))


@dataclass(frozen=True)
class _PerImage:
    parameters: int
    activations: int
    outputs: int


@lru_cache(maxsize=64)
def _per_image(
    model: ModelConfig,
    num_classes: int,
    image_px: tuple[int, int],
    contrastive: ContrastiveConfig | None,
    half: bool,
    checkpointing: bool,
    semi_strong: bool,
) -> _PerImage:
    """Parameters, and bytes that the forward pass of one image leaves for the backward pass.

    The pass runs on fake CPU tensors: they know their shapes and dtypes but have no memory.
    """
    network = CastNetwork(outline(model, num_classes), contrastive)
    kept = _Kept(network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu").train()
        segmenter = network.segmenter
        if checkpointing:
            blocks = segmenter.checkpoint_activations()
            for block in blocks:  # their inputs are kept by closures, which the hooks below do not see
                block.register_forward_pre_hook(kept.note_inputs, with_kwargs=True)
        image = torch.zeros((1, 3, *image_px), dtype=torch.uint8)
        with (
            torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            output = network(image, image if contrastive is not None else None, (), 0 if semi_strong else None)
    num_parameters = sum(p.numel() for p in network.parameters())
    num_bytes = sum(t.numel() * t.element_size() for t in loss_inputs(output))
    return _PerImage(num_parameters, kept.num_bytes, num_bytes)


class _Kept:
    """Storages that autograd keeps, each counted once, without the network's own weights."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.storages: dict[int, Any] = {}
        self.own: set[int] | None = None

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.own is None:  # known only once the weights are fake
            self.own = {p.untyped_storage()._cdata for p in self.network.parameters()}
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage  # held, so that its number is not used again
        return tensor

    def note_inputs(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self.note(value)

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())
