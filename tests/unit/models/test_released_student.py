"""The student of the authors' code: its decoder, its padding, its named variant, and that it learns and is kept."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_scenes import LOSS, NUM_CLASSES, make_batch

from cast_ray.contracts.records import Category
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.batch_norm import JointBatchNorm
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.padding import cut_padding
from cast_ray.models.segmenter import build_segmenter, outline
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, ModelConfig, TrainConfig, build_recipe, parse_overrides

TINY = ModelConfig(
    encoder=EncoderConfig(name="vit", widths=(16, 32, 64, 128), stem_stride=2),  # patches of 8 px
    decoder="dpt-released",
    hidden_dim=16,
    num_queries=9,
    num_layers=2,
    num_heads=2,
    feedforward_dim=16,
    proposals=False,
)
RECIPE = build_recipe("cityscapes", "full", {"student": "released"})


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    ("size", "masks"), [((630, 630), (360, 360)), ((512, 1024), (293, 586)), ((1024, 2048), (586, 1171))]
)
def test_the_full_size_has_the_released_widths_and_strides(size: tuple[int, int], masks: tuple[int, int]) -> None:
    model = outline(RECIPE.student, 8).eval().requires_grad_(False)
    padded = [-(-side // 14) * 14 for side in size]
    seen: dict[str, torch.Size] = {}
    assert model.decoder is not None
    model.decoder.register_forward_hook(
        lambda module, args, out: seen.update(
            {f"level {s}": x.shape for s, x in out.levels.items()} | {"masks": out.mask_features.shape}
        )
    )
    out = model(torch.empty(1, 3, *size, dtype=torch.uint8, device="meta"))
    for name, stride in (("level 16", 14), ("level 8", 7), ("level 4", 3.5), ("masks", 1.75)):
        assert seen[name] == (1, 384, *(side / stride for side in padded)), name
    assert len(seen) == 4
    assert {x.shape for x in out.mask_logits} == {(1, 100, *masks)} and len(out.mask_logits) == 10
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 14 and all(isinstance(m, JointBatchNorm) for m in norms)
    assert sum(p.numel() for p in model.parameters()) == 77_889_993


def test_padding_goes_to_whole_patches_and_only_the_logits_are_cut() -> None:
    model = build_segmenter(TINY, NUM_CLASSES, seed=0).eval()
    whole = model(images(40, 24))  # a patch grid of 5 x 3: both sides are odd
    assert whole.mask_logits[-1].shape[2:] == (20, 12)
    assert whole.features[16].shape[2:] == (3, 2)
    for height, width in ((37, 24), (34, 20)):
        image = images(40, 24)[..., :height, :width]
        found = model(image)
        padded = model(F.pad(image, (0, 24 - width, 0, 40 - height)))
        for mine, theirs in zip(found.mask_logits, padded.mask_logits):
            assert mine.shape[2:] == (-(-height // 2), width // 2)
            torch.testing.assert_close(mine, cut_padding(theirs, (40, 24), (height, width)))
        for mine, theirs in zip(found.class_logits, padded.class_logits):
            assert torch.equal(mine, theirs)  # the queries attended to the padding


@pytest.mark.parametrize("encoder", ["vit", "conv"])
@pytest.mark.parametrize("proposals", [False, True])
def test_every_parameter_gets_a_gradient(encoder: str, proposals: bool) -> None:
    part = TINY.encoder.model_copy(update={"name": encoder})
    model = build_segmenter(TINY.model_copy(update={"encoder": part, "proposals": proposals}), NUM_CLASSES, 0)
    out = model(images(32, 48))
    assert out.mask_logits[-1].shape[2:] == (16, 24)
    terms = [x.square().mean() for x in (*out.class_logits, *out.mask_logits)]
    sum(terms + [x.sum() * 1e-3 for x in (*out.features.values(), *out.auxiliary.values())]).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n] == []


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_it_learns_one_batch_by_heart_and_comes_back_from_a_folder(ema: float, tmp_path: Path) -> None:
    network = CastNetwork(build_segmenter(TINY, NUM_CLASSES, seed=0), None)
    batch = make_batch((2, 3, 1, 2), num_labelled=4)
    config = TrainConfig(steps=120, lr=3e-3, ema=ema)
    result = train(network, Objective(LOSS, None, proposals=False), repeat(batch), config, RunSettings("f", 0, World()))
    assert result.curve[-1]["loss"] < 0.35 * result.curve[0]["loss"]

    categories = [Category(i, f"c{i}") for i in range(NUM_CLASSES)]
    student = Student(network.segmenter, categories, (32, 32)).eval()
    found = student.predict(batch.weak)
    best = [max((_iou(mask, i) for i in of_image), default=0.0) for mask, of_image in _objects(batch, found)]
    assert sum(best) / len(best) > 0.6  # with the running statistics of batch norm
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path)
    assert again.predict(batch.weak) == found
    tracked = again.state_dict()["segmenter.decoder.fusions.0.residual_layer2.batch_norm1.num_batches_tracked"]
    assert int(tracked) == 120


def _objects(batch, found):
    """Each true mask, with the instances of its label that were found on its image."""
    for target, instances in zip(batch.targets, found):
        for mask, label in zip(target.masks, target.labels.tolist()):
            yield mask, [i for i in instances if i["label"] == label]


def _iou(mask: torch.Tensor, instance) -> float:
    from pycocotools import mask as coco_mask

    other = torch.from_numpy(coco_mask.decode({"size": instance["size"], "counts": instance["rle"]})).bool()
    return float((mask & other).sum() / (mask | other).sum())


def test_the_named_variants_of_the_student() -> None:
    given = {"student.encoder.checkpoint": "some/folder"}
    released, paper = (build_recipe("cityscapes", "full", given | {"student": n}) for n in ("released", "paper"))
    assert paper == build_recipe("cityscapes", "full", given)  # the preset is the paper's
    student = released.student
    assert (student.encoder.name, student.encoder.checkpoint) == ("dinov2-s", "some/folder")
    assert (student.decoder, student.hidden_dim, student.num_queries, student.num_layers) == (
        "dpt-released",
        384,
        100,
        9,
    )
    assert (student.num_heads, student.feedforward_dim, student.head) == (8, 2048, "masked-attention")
    assert not student.proposals
    small = build_recipe("shapes", "smoke", {"student": "released"}).student
    assert small.model_dump(exclude={"encoder"}) == student.model_dump(exclude={"encoder"})
    assert small.encoder.name == "dinov2-s"


def test_one_switch_selects_every_part() -> None:
    whole = build_recipe("cityscapes", "full", {"variant": "released"})
    parts = build_recipe("cityscapes", "full", {"contrastive": "released", "student": "released"})
    assert whole == parts and whole.contrastive.hinge == 0.5 and whole.student.hidden_dim == 384
    assert (
        build_recipe("cityscapes", "full", {"variant": "paper"}).student == build_recipe("cityscapes", "full").student
    )
    pairs = ["contrastive.hinge=0.7", "student=paper", "variant=released", "student.num_layers=6"]
    for given in (pairs, pairs[::-1]):  # the whole, then parts, then fields
        mixed = build_recipe("cityscapes", "full", parse_overrides(given))
        assert (mixed.contrastive.head, mixed.contrastive.hinge) == ("frozen", 0.7)
        assert (mixed.student.hidden_dim, mixed.student.num_layers) == (256, 6)


@pytest.mark.parametrize("key", ["variant", "student", "contrastive"])
def test_an_unknown_variant_names_the_nearest(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}='relesed': did you mean 'released'"):
        build_recipe("shapes", overrides={key: "relesed"})


@pytest.mark.parametrize(("part", "stage"), [("student", "distill"), ("student", "refine"), ("teacher", "selftrain")])
def test_a_step_in_parts_is_refused_with_batch_norm(part: str, stage: str) -> None:
    overrides = {f"{part}.decoder": "dpt-released", f"stages.{stage}.accumulate": 2}
    with pytest.raises(ValueError, match=rf"stages\.{stage}\.accumulate is 2 and {part}\.decoder dpt-released"):
        build_recipe("shapes", overrides=overrides)
    other = "teacher" if part == "student" else "student"
    build_recipe("shapes", overrides=overrides | {f"{part}.decoder": "dpt", f"{other}.decoder": "dpt-released"})
