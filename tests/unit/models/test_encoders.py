"""Every encoder: from a hub-format folder to a trained, saved and reloaded model; sizes, layers, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_folders import make_model, make_sam2_video, save_folder
from training_scenes import LOSS, make_batch
from transformers import Dinov2Backbone, Dinov2WithRegistersBackbone, DINOv3ViTBackbone, Sam2VisionModel

from cast_ray.common.registry import ROWS
from cast_ray.contracts.records import Category
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.backbones import ARCHITECTURES
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.projector import select_stride
from cast_ray.models.segmenter import Segmenter, build_segmenter, outline
from cast_ray.models.student import Student
from cast_ray.models.vit_encoders import ViTEncoder
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig, EncoderConfig, ModelConfig, TrainConfig

NUM_CLASSES = 3
VITS = [n for n, a in ARCHITECTURES.items() if a.model_type.startswith("dino")]
TINY = {"widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "stem_stride": 2}
CATEGORIES = [Category(10 * i, name) for i, name in enumerate("abc")]


def tiny(name: str, checkpoint: object = "", **options: object) -> ModelConfig:
    own = {} if name in ARCHITECTURES else TINY
    encoder = EncoderConfig(name=name, checkpoint=str(checkpoint), **own)
    settings = {"hidden_dim": 32, "num_queries": 6, "num_layers": 2, "num_heads": 2, "feedforward_dim": 32}
    return ModelConfig(encoder=encoder, proposals=False, decoder_layers=1, **settings | options)


def images(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def folder_of(name: str, tmp_path: Path) -> str:
    """A checkpoint folder of a published encoder, nothing for the others."""
    if name not in ARCHITECTURES:
        return ""
    save_folder(name, tmp_path / "hub")
    return str(tmp_path / "hub")


@pytest.mark.parametrize("name", ROWS["encoders"])
def test_from_a_folder_through_training_to_a_reloaded_student(name: str, tmp_path: Path) -> None:
    segmenter = build_segmenter(tiny(name, folder_of(name, tmp_path)), NUM_CLASSES, seed=0)
    before = {k: v.clone() for k, v in segmenter.state_dict().items()}
    contrast = ContrastiveConfig(num_negatives=4, num_anchors=8, pool_size=16, projection_dims=(8,), feature_stride=16)
    network = CastNetwork(segmenter, contrast)
    config = TrainConfig(steps=1, lr=1e-3, ema=0)
    loss = LOSS.model_copy(update={"lambda_semi": 1.0})
    result = train(
        network,
        Objective(loss, contrast, proposals=False),
        iter([make_batch((2, 3), num_labelled=1)]),
        config,
        RunSettings("f", 0, World()),
    )
    assert result.curve[-1]["loss"] > 0
    moved = [k for k, p in segmenter.named_parameters() if not torch.equal(p.detach(), before[k])]
    assert any(k.startswith("encoder.") for k in moved) and any(k.startswith("head.") for k in moved)

    Student(segmenter, CATEGORIES, (64, 96)).save_pretrained(tmp_path / "student")
    if name in ARCHITECTURES:  # the folder says it all: the checkpoint may be gone
        (tmp_path / "hub" / "config.json").unlink()
    again = Student.from_pretrained(tmp_path / "student")
    segmenter.eval()
    wanted = segmenter(images())
    out = again(images())
    assert torch.equal(out.mask_logits[-1], wanted.mask_logits[-1])
    assert torch.equal(out.class_logits[-1], wanted.class_logits[-1])
    assert again.predict(images()) == Student(segmenter, CATEGORIES, (64, 96)).predict(images())


@pytest.mark.parametrize("name", ROWS["encoders"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build_segmenter(tiny(name) if name not in ARCHITECTURES else shrunk(name), NUM_CLASSES, 0).train()
    out = model(images(64, 64))
    terms = [x.square().mean() for x in (*out.class_logits, *out.mask_logits)]
    terms += [x.square().mean() * 1e-3 for x in out.features.values()]
    sum(terms).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def shrunk(name: str) -> ModelConfig:
    """A published encoder without its folder is full-size; small ones only, and a small rest."""
    large = ("dinov2-b", "dinov2-l", "dinov3-l", "swin-s")
    return (
        tiny({"dinov3-l": "dinov3-s", "swin-s": "swin-t"}.get(name, "dinov2-s"))
        if name.startswith(large)
        else tiny(name)
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_checkpoints_weights_are_the_encoders(name: str, tmp_path: Path) -> None:
    theirs = save_folder(name, tmp_path)
    ours = build_segmenter(tiny(name, tmp_path), NUM_CLASSES, 0).encoder.backbone.state_dict()
    own = {k for k in ours if "hidden_states_norms" not in k}
    prefixes = ("", "resnet.", "swin.", "convnext.", "vision_encoder.backbone.")
    for key in own:
        match = next((p + key for p in prefixes if p + key in theirs), None)
        assert match is not None, key
        assert torch.equal(ours[key], theirs[match]), key
    assert len(own) > 10


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("size", [(56, 56), (112, 84)])
def test_vit_maps_are_the_backbones_own(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    save_folder(name, tmp_path)
    encoder = build_segmenter(tiny(name, tmp_path, head="eomt", num_layers=1), NUM_CLASSES, 0).encoder.eval()
    assert isinstance(encoder, ViTEncoder)
    kind = {"dinov2": Dinov2Backbone, "dinov2_with_registers": Dinov2WithRegistersBackbone}
    backbone = kind.get(ARCHITECTURES[name].model_type, DINOv3ViTBackbone).from_pretrained(
        tmp_path, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    patch = encoder.patch_px
    pixels = torch.randn(2, 3, size[0] // 14 * patch, size[1] // 14 * patch)
    with torch.no_grad():
        tokens = encoder.embed(pixels)
        states = tokens.states
        for layer, wanted in zip(encoder.transformer_layers, backbone.eval()(pixels).feature_maps, strict=True):
            states = layer(states, **tokens.options)
            torch.testing.assert_close(encoder.to_map(states, tokens.grid), wanted, rtol=1e-5, atol=1e-5)


# Of the published models without their classification heads, counted on the hub or in the papers.
PUBLISHED = {
    "dinov2-s": 22_056_576,
    "dinov2-b": 86_580_480,
    "dinov2-l": 304_368_640,
    "dinov2-s-reg": 22_058_112,
    "resnet50": 23_508_032,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_size_architectures_need_no_download(name: str) -> None:
    config = ModelConfig(
        encoder=EncoderConfig(name=name, checkpoint="hub"),
        hidden_dim=256,
        num_queries=100,
        num_layers=9,
        num_heads=8,
        feedforward_dim=2048,
        proposals=False,
    )
    model = outline(config, 8)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    encoder = sum(p.numel() for p in model.encoder.pretrained().parameters())
    assert encoder == PUBLISHED.get(name, encoder)
    assert (
        round(encoder / 1e6)
        == {
            "dinov2-s": 22,
            "dinov2-b": 87,
            "dinov2-l": 304,
            "dinov2-s-reg": 22,
            "dinov2-b-reg": 87,
            "dinov2-l-reg": 304,
            "dinov2-s-reg16": 22,
            "dinov2-b-reg16": 87,
            "dinov2-l-reg16": 305,
            "dinov3-s": 22,
            "dinov3-l": 303,
            "resnet50": 24,  # 24, 35 and 22 of dinov2-s are the paper's
            "sam2-s": 34,
            "swin-t": 28,
            "swin-s": 49,
            "convnext-t": 28,
        }[name]
    )
    out = model.eval().requires_grad_(False)(torch.empty(1, 3, 512, 1024, dtype=torch.uint8, device="meta"))
    strides = [4, 8, 16, 32]
    assert list(out.features) == list(model.feature_dims) == strides
    shrink = model.encoder.patch_px / 16 if isinstance(model.encoder, ViTEncoder) else 1
    for stride, features in out.features.items():
        assert features.shape[2:] == tuple(-(-size // (stride * shrink)) for size in (512, 1024))
    if name == "dinov2-s":
        assert sum(p.numel() for p in model.parameters()) == 53_141_577  # the paper: 52 M
        assert model.feature_dims == {4: 96, 8: 192, 16: 384, 32: 768}  # 768: what the released head takes


@pytest.mark.parametrize("name", ["dinov2-s", "dinov3-s", "swin-t", "sam2-s", "resnet50", "convnext-t", "vit", "conv"])
@pytest.mark.parametrize("head", ["masked-attention", "eomt"])
def test_any_image_size(name: str, head: str, tmp_path: Path) -> None:
    if head == "eomt" and name not in (*VITS, "vit"):
        return
    model = build_segmenter(tiny(name, folder_of(name, tmp_path), head=head), NUM_CLASSES, 0).eval()
    for height, width in ((64, 64), (61, 75), (33, 130)):
        out = model(images(height, width))
        rows, columns = out.mask_logits[-1].shape[2:]
        assert rows / columns == pytest.approx(height / width, rel=0.15)
        assert 3 < height / rows <= 4 and 3 < width / columns <= 4
        assert model.encode(images(height, width)).keys() == out.features.keys()
        for stride, features in model.encode(images(height, width)).items():
            torch.testing.assert_close(features, out.features[stride])


def test_layers_hold_each_pretrained_weight_once_stem_first(tmp_path: Path) -> None:
    for name in ROWS["encoders"]:
        encoder = outline(tiny(name), NUM_CLASSES).encoder
        layers = encoder.layers()
        flat = [id(p) for layer in layers for p in layer]
        assert sorted(flat) == sorted(id(p) for p in encoder.pretrained().parameters())
        assert all(layers)
        if name != "conv":  # whose first stage is its stem
            assert len(layers) == len(encoder.blocks()) + 1
            names = {id(p): n for n, p in encoder.named_parameters()}
            assert all("embed" in names[id(p)] for p in layers[0])


@pytest.mark.parametrize("name", ["dinov2-s", "dinov3-s", "swin-t", "sam2-s", "resnet50", "convnext-t", "conv"])
@pytest.mark.parametrize("head", ["masked-attention", "eomt"])
def test_checkpointed_activations_give_the_same_gradients(name: str, head: str, tmp_path: Path) -> None:
    if head == "eomt" and name not in VITS:
        return
    config = tiny(name, folder_of(name, tmp_path), head=head)

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor | None]:
        model = build_segmenter(config, NUM_CLASSES, 0).train()
        if checkpointed:
            assert len(model.checkpoint_activations()) >= 4
        torch.manual_seed(0)
        out = model(images())
        sum(x.square().mean() for x in (*out.class_logits, *out.mask_logits)).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, saved = gradients(False), gradients(True)
    for key, grad in plain.items():
        if grad is None:
            assert saved[key] is None
        else:
            torch.testing.assert_close(saved[key], grad)


def test_batch_norm_keeps_its_published_statistics(tmp_path: Path) -> None:
    save_folder("resnet50", tmp_path)
    model = build_segmenter(tiny("resnet50", tmp_path), NUM_CLASSES, 0).train()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items() if "running" in k or "num_batches" in k}
    both = model(images())
    assert before and all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in before.items())
    alone = model(images()[1:])  # an image does not see its batch, in training either
    torch.testing.assert_close(both.mask_logits[-1][1:], alone.mask_logits[-1], rtol=1e-4, atol=1e-4)
    norms = [m for m in model.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for m in norms for p in m.parameters())


def test_half_precision_checkpoints_are_trained_in_full(tmp_path: Path) -> None:
    make_model("dinov2-s").half().save_pretrained(tmp_path)
    model = build_segmenter(tiny("dinov2-s", tmp_path), NUM_CLASSES, 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_encoder_inside_every_form_of_sam2(tmp_path: Path) -> None:
    video = make_sam2_video()
    vision: Sam2VisionModel = video.vision_encoder
    video.save_pretrained(tmp_path / "video")
    vision.save_pretrained(tmp_path / "vision")
    vision.backbone.save_pretrained(tmp_path / "hiera")
    wanted = vision.backbone.state_dict()
    for folder in ("video", "vision", "hiera"):
        found = build_segmenter(tiny("sam2-s", tmp_path / folder), NUM_CLASSES, 0).encoder.backbone.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_folder("resnet50", tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'resnet': encoder 'dinov2-s' expects dinov2$"):
        build_segmenter(tiny("dinov2-s", tmp_path), NUM_CLASSES, 0)


def test_a_missing_or_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"encoder.checkpoint '{tmp_path}/gone': no model to load") as error:
        build_segmenter(tiny("dinov2-s", tmp_path / "gone"), NUM_CLASSES, 0)
    assert "\n" not in str(error.value)
    save_folder("dinov2-s", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="the weights cannot be loaded"):
        build_segmenter(tiny("dinov2-s", tmp_path), NUM_CLASSES, 0)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_folder("dinov2-s", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the encoder 'dinov2-s': encoder.layer.4"):
        build_segmenter(tiny("dinov2-s", tmp_path), NUM_CLASSES, 0)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_encoders_without_published_weights_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"the encoder '{name}' has no pretrained weights"):
        build_segmenter(tiny(name, "hub"), NUM_CLASSES, 0)
    with pytest.raises(ValueError, match="'convnext' has no published weights"):
        build_segmenter(tiny("convnext", "hub"), NUM_CLASSES, 0)


def test_the_tiny_vit_needs_widths_that_double() -> None:
    config = tiny("vit")
    encoder = config.encoder.model_copy(update={"widths": (8, 16, 24, 32)})
    with pytest.raises(ValueError, match=r"encoder.widths is \[8, 16, 24, 32\]: the encoder 'vit' expects four"):
        Segmenter(config.model_copy(update={"encoder": encoder}), NUM_CLASSES)


@pytest.mark.parametrize(
    ("name", "layers"), [("dinov2-s", (3, 6, 9, 12)), ("dinov2-l", (5, 12, 18, 24)), ("dinov3-s", (3, 6, 9, 12))]
)
def test_hidden_layers_are_taken_as_in_dpt(name: str, layers: tuple[int, ...]) -> None:
    encoder = outline(tiny(name), NUM_CLASSES).encoder
    assert isinstance(encoder, ViTEncoder) and encoder.taken == layers


@pytest.mark.parametrize(
    ("name", "head", "column", "stride", "width"),
    [
        ("dinov2-s", "masked-attention", "released", 32, 768),  # 28 px: what the released code projects
        ("dinov2-s", "masked-attention", "paper", 8, 192),
        ("dinov2-s", "eomt", "released", 16, 384),  # all there is
        ("dinov2-s", "eomt", "paper", 16, 384),
        ("resnet50", "masked-attention", "released", 32, 2048),
    ],
)
def test_the_contrast_finds_its_map(name: str, head: str, column: str, stride: int, width: int) -> None:
    config = ContrastiveConfig(**CONTRASTIVE_PRESETS[column])
    dims = outline(tiny(name, head=head), NUM_CLASSES).feature_dims
    assert select_stride(dims, config) == stride and dims[stride] == width


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [{"decoder": "dpt"}, {"decoder": "fpn"}, {"decoder": "msdeform"}, {"head": "eomt"}])
def test_half_precision_trains_and_agrees(change: dict, half: torch.dtype) -> None:
    model = build_segmenter(tiny("vit", **change), NUM_CLASSES, 0).train()
    wanted = model(images())
    with torch.autocast("cpu", half):
        out = model(images(60, 90))
        found = model(images())
    assert out.mask_logits[-1].isfinite().all()
    spread = wanted.mask_logits[0].std()
    assert (found.mask_logits[0].float() - wanted.mask_logits[0]).abs().mean() < 0.1 * spread
    sum(x.float().square().mean() for x in (*found.class_logits, *found.mask_logits)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
