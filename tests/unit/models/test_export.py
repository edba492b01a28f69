"""The exported graph against PyTorch, and against the student's own inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_folders import save_folder
from pycocotools import mask as coco_mask

from cast_ray.cli import export
from cast_ray.contracts.records import Category
from cast_ray.models.export import OUTPUTS, Detector, export_onnx
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, InputSize, ModelConfig

onnxruntime = pytest.importorskip("onnxruntime", reason="optional extra `export`")

SIZE = (64, 96)
NUM = 12
WIDTHS = {"widths": (8, 16, 32, 64), "stem_stride": 2}


def make(encoder: str = "conv", checkpoint: str = "", **options: object) -> Student:
    own = WIDTHS if encoder in ("conv", "vit", "convnext") else {"checkpoint": checkpoint}
    settings = {"hidden_dim": 32, "num_queries": 9, "num_layers": 2, "num_heads": 2, "feedforward_dim": 32}
    config = ModelConfig(
        encoder=EncoderConfig(name=encoder, **own), decoder_layers=1, **{"proposals": False} | settings | options
    )
    segmenter = build_segmenter(config, 3, seed=1)
    with torch.no_grad():  # spread the scores and masks, which all but agree before training
        for parameter in segmenter.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    segmenter.anneal(1.0)
    return Student(segmenter, [Category(i, f"c{i}") for i in range(3)], SIZE).eval()


def images(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *SIZE), generator=torch.Generator().manual_seed(batch)).byte()


def inputs(batch: int, inside: tuple[int, int] = SIZE, own: tuple[int, int] = SIZE) -> dict[str, torch.Tensor]:
    return {"images": images(batch), "inside_hw": torch.tensor(inside), "image_hw": torch.tensor(own)}


def run(session: Any, given: dict[str, torch.Tensor], names: list[str] | None = None) -> Any:
    return session.run(names, {name: tensor.numpy() for name, tensor in given.items()})


def check(student: Student, path: Path) -> None:
    export_onnx(student, path, NUM)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == list(OUTPUTS)
    for given in (inputs(1), inputs(3, inside=(48, 96), own=(57, 114))):
        with torch.no_grad():
            wanted = dict(zip(OUTPUTS, Detector(student, NUM)(**given)))
        found = dict(zip(OUTPUTS, run(session, given)))
        for name, tensor in wanted.items():
            assert found[name].shape == tuple(tensor.shape), name
        np.testing.assert_allclose(found["scores"], wanted["scores"].numpy(), atol=1e-3)
        np.testing.assert_allclose(found["boxes"], wanted["boxes"].numpy(), atol=1e-3)
        assert (found["labels"] == wanted["labels"].numpy()).all()
        assert (found["masks"] != wanted["masks"].numpy()).mean() < 1e-3
        assert found["masks"].any() and len(np.unique(found["labels"])) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "conv", "proposals": True},
        {"encoder": "conv", "proposals": True, "local_masks": True},
        {"encoder": "vit", "decoder": "msdeform"},
        {"encoder": "vit", "decoder": "dpt-released"},
        {"encoder": "vit", "head": "eomt"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_onnxruntime_gives_the_same_detections(options: dict, tmp_path: Path) -> None:
    check(make(**options), tmp_path / "student.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder", ["convnext-t", "dinov2-s", "dinov2-s-reg", "dinov3-s", "resnet50", "sam2-s", "swin-t"]
)
def test_every_kind_of_encoder_exports(encoder: str, tmp_path: Path) -> None:
    save_folder(encoder, tmp_path / "hub")
    check(make(encoder, checkpoint=str(tmp_path / "hub"), decoder="fpn"), tmp_path / "student.onnx")


@pytest.mark.parametrize(
    ("inside", "own"),
    [(SIZE, SIZE), ((48, 96), (96, 192)), ((64, 80), (37, 46))],
    ids=["as given", "padded and larger", "padded and smaller"],
)
@torch.no_grad()
def test_the_detector_finds_what_the_student_finds(inside: tuple[int, int], own: tuple[int, int]) -> None:
    student = make()
    boxes, labels, scores, masks = Detector(student, NUM)(**inputs(2, inside, own))
    found = student.predict(images(2), [own, own], [inside, inside], max_detections=NUM)
    for b, instances in enumerate(found):
        seen = [k for k in range(NUM) if masks[b, k].any()]
        assert len(instances) == len(seen) > 0
        for k, instance in zip(seen, instances):
            assert instance["label"] == labels[b, k] and instance["score"] == pytest.approx(
                float(scores[b, k]), abs=1e-6
            )
            rle = {"size": instance["size"], "counts": instance["rle"]}
            assert np.array_equal(coco_mask.decode(rle).astype(bool), masks[b, k].numpy())
            x, y, width, height = coco_mask.toBbox(rle)
            assert boxes[b, k].tolist() == [x, y, x + width, y + height]
        assert all(scores[b, k] == 0 and not boxes[b, k].any() for k in range(NUM) if k not in seen)


def test_the_model_knows_its_classes_and_the_student_stays_as_it_was(tmp_path: Path) -> None:
    student = make("vit", head="eomt", num_layers=1)
    export_onnx(student, tmp_path / "student.onnx", NUM)
    facts = onnxruntime.InferenceSession(str(tmp_path / "student.onnx")).get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == ["c0", "c1", "c2"] and json.loads(facts["image_px"]) == [64, 96]
    assert student.segmenter.encoder.backbone.config._attn_implementation == "sdpa"


def test_a_student_of_native_images_needs_the_size_of_its_model(tmp_path: Path, capsys: Any) -> None:
    """A graph of the crop's size would see native images shrunk: the size is asked for, never taken for granted."""
    native = Student(make("vit").segmenter, make("vit").categories, (64, 96), input_size=InputSize("native")).eval()
    native.save_pretrained(tmp_path / "native")
    command = ["--student", str(tmp_path / "native"), "--out", str(tmp_path / "s.onnx")]
    assert export.main(command) == 2
    assert "one size: name it by --image-px H W" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        export.main([*command, "--image-px", "0", "9"])
    assert "--image-px: expected a whole number, 1 or more, got '0'" in capsys.readouterr().err
    assert export.main([*command, "--image-px", "96", "80", "--max-detections", str(NUM)]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["image_px"]) == [96, 80]
    pixels = torch.randint(0, 256, (1, 3, 96, 80), generator=torch.Generator().manual_seed(1)).byte()
    (scores,) = run(session, inputs(1, (96, 80), (96, 80)) | {"images": pixels}, ["scores"])
    wanted = [i["score"] for i in native.predict(pixels, max_detections=NUM)[0]]
    np.testing.assert_allclose(scores[0][: len(wanted)], wanted, rtol=1e-3, atol=1e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "student")
    assert export.main(["--student", str(tmp_path / "student"), "--out", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "README.md").is_file()
    arguments = ["--student", str(tmp_path / "copy"), "--out", str(tmp_path / "new" / "S4.ONNX")]
    assert export.main([*arguments, "--max-detections", "5"]) == 0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"S4.ONNX", "export.json"}
    session = onnxruntime.InferenceSession(str(tmp_path / "new" / "S4.ONNX"))
    assert run(session, inputs(1), ["scores"])[0].shape == (1, 5)
    assert export.main(["--student", str(tmp_path / "gone"), "--out", "x"]) == 2
    assert "no saved student" in capsys.readouterr().err
