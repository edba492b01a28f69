"""The memory estimate against what autograd really keeps, and how it follows the settings."""

from __future__ import annotations

import pytest
import torch

from cast_ray.engine.memory import estimate_inference_memory, estimate_memory
from cast_ray.evaluation.efficiency import peak_memory
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.cost import seen_size
from cast_ray.plan.graph import plan
from cast_ray.plan.memory import inference_memory
from cast_ray.plan.stage_parts import PublishedTeacher, TrainPart
from cast_ray.recipe import ContrastiveConfig, EncoderConfig, ModelConfig, TrainConfig, build_recipe

VIT = EncoderConfig(name="vit", widths=(8, 16, 32, 64), depths=(1, 1, 2, 2), stem_stride=2)
MODEL = ModelConfig(encoder=VIT, hidden_dim=32, num_queries=10, num_layers=3, num_heads=2, proposals=False)
TRAIN = TrainConfig(batch_labelled=2, batch_unlabelled=2)
NO_UNLABELLED = TrainConfig(batch_labelled=2, batch_unlabelled=0)
CONTRAST = ContrastiveConfig(projection_dims=(8, 8))
SIZE = (64, 96)


def estimate(model: ModelConfig = MODEL, train: TrainConfig = TRAIN, **options):
    return estimate_memory(model, train, num_classes=3, image_px=SIZE, **options)


def really_kept(model: ModelConfig, contrastive: ContrastiveConfig | None, half: bool) -> int:
    """Bytes of the storages that a real forward pass of one image leaves for the backward pass."""
    network = CastNetwork(build_segmenter(model, 3, 0), contrastive).train()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    image = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        output = network(image, image)
    assert output.predictions.mask_logits
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("contrastive", [None, CONTRAST], ids=["set loss", "both views"])
@pytest.mark.parametrize(
    "change", [{}, {"decoder": "msdeform"}, {"head": "eomt"}, {"proposals": True}], ids=["dpt", "msdeform", "eomt", "+"]
)
def test_activations_are_what_autograd_keeps(change: dict, contrastive: ContrastiveConfig | None, half: bool) -> None:
    model = MODEL.model_copy(update=change)
    found = estimate(model, contrastive=contrastive, half=half).activations / 4
    assert found == pytest.approx(really_kept(model, contrastive, half), rel=0.05)


def test_weights_count_gradients_moments_and_the_average() -> None:
    num = sum(p.numel() for p in build_segmenter(MODEL, 3, 0).parameters())
    assert estimate().weights == 5 * 4 * num
    assert estimate(train=TRAIN.model_copy(update={"ema": 0.0})).weights == 4 * 4 * num


def test_it_follows_the_settings() -> None:
    base = estimate()
    assert base.total == base.weights + base.activations + base.outputs
    assert estimate(num_workers=2).activations == base.activations / 2
    assert estimate(train=NO_UNLABELLED).activations == base.activations / 2
    parted = estimate(train=TRAIN.model_copy(update={"accumulate": 4}))
    assert (parted.activations, parted.outputs) == (base.activations / 4, base.outputs)
    assert estimate(half=True).activations < base.activations
    assert estimate(gradient_checkpointing=True).activations < 0.7 * base.activations
    assert estimate(contrastive=CONTRAST).activations > 1.2 * base.activations
    assert "GiB" in str(base)


def test_pseudo_labels_on_the_strong_view_cost_a_decoder_more_of_d_u_beside_l_pxl_alone() -> None:
    assert estimate(semi_strong=True) == estimate()
    both, pxl = estimate(contrastive=CONTRAST, semi_strong=True), estimate(contrastive=CONTRAST)
    assert both.weights == pxl.weights and pxl.activations < both.activations < 2 * pxl.activations
    assert pxl.outputs < both.outputs < 2 * pxl.outputs
    labelled = estimate(contrastive=CONTRAST, semi_strong=True, train=NO_UNLABELLED)
    assert labelled == estimate(contrastive=CONTRAST, train=NO_UNLABELLED)


def test_the_papers_student_on_one_gpu() -> None:
    recipe = build_recipe("cityscapes", "full")
    found = estimate_memory(
        recipe.student,
        recipe.stages.distill,
        num_classes=8,
        image_px=(512, 1024),
        contrastive=recipe.contrastive,
        half=True,
    )
    # Weights, gradients and two moments of 53 M parameters in float32, and a projector.
    assert found.weights / 2**30 == pytest.approx(0.80, abs=0.01)
    assert 10 < found.total / 2**30 < 24


def test_inference_needs_what_a_pass_holds_at_once() -> None:
    """On fake tensors as on real ones, and by the pixels of what the model is given."""
    real = build_segmenter(MODEL, 3, 0).eval()
    weights = sum(p.numel() * p.element_size() for p in real.parameters())
    images = torch.zeros(2, 3, *SIZE, dtype=torch.uint8)
    held = peak_memory(lambda: real(images), torch.device("cpu"))
    found = estimate_inference_memory(MODEL, num_classes=3, image_px=SIZE, images=2)
    assert found - weights == pytest.approx(held, rel=0.05)
    larger = estimate_inference_memory(MODEL, num_classes=3, image_px=(128, 192), images=2)
    assert 3 * held < larger - weights < 20 * held  # attention grows with the square of the pixels


def test_the_papers_student_sees_whole_images_on_one_gpu() -> None:
    recipe = build_recipe("cityscapes", "full")
    crop, whole = (
        estimate_inference_memory(recipe.student, num_classes=8, image_px=size, images=recipe.evaluation.batch)
        for size in ((512, 1024), (1024, 2048))
    )
    assert crop < whole / 2 and whole / 2**30 < 24


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({}, (64, 96)),
        ({"data.inference_resize": "native"}, (200, 300)),
        ({"data.inference_resize": "[40, 900]"}, (40, 60)),
    ],
)
def test_a_plan_knows_the_size_of_whole_images(overrides: dict, size: tuple[int, int]) -> None:
    recipe = build_recipe("shapes", "smoke", {"data.image_px": "[64, 96]", "labels.batch": 2} | overrides)
    row = plan(recipe, "0" * 64)
    for name in ("student", "label-teacher"):
        stage = row.roles[name]
        model = TrainPart.of(row.roles["distill" if name == "student" else "selftrain"]).model
        assert isinstance(model, ModelConfig)
        images = recipe.evaluation.batch if name == "student" else 2
        assert seen_size(stage, (200, 300)) == size
        wanted = estimate_inference_memory(model, num_classes=4, image_px=size, images=images)
        assert inference_memory(stage, recipe, model, 4, (200, 300)) == wanted
    assert seen_size(row.roles["distill"], (200, 300)) == (64, 96)
    unknown = inference_memory(row.roles["student"], recipe, recipe.student, 4, None)
    assert (unknown is None) == bool(overrides)
    assert inference_memory(row.roles["student"], recipe, PublishedTeacher({"kind": "sam3"}), 4, (200, 300)) is None
