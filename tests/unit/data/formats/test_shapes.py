"""The embedded dataset: deterministic, cached, finished or redrawn, valid COCO."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from cast_ray.common.paths import write_bytes
from cast_ray.contracts.records import RECORD_SCHEMA
from cast_ray.data.formats import shapes
from cast_ray.data.formats.scenes import CATEGORIES, LAYOUTS, STYLES, draw_scene
from cast_ray.data.reading.images import read_image
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig, ShapesConfig

SMALL = ShapesConfig(num_source=8, num_train=12, num_val=4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes.draw(str(root), SMALL, num_processes=1)
    return root


def _contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_splits_follow_the_schema(drawn):
    splits = load(DataConfig(root=str(drawn), shapes=SMALL))[0]
    assert splits.source is not None
    assert (splits.source.num_rows, splits.train.num_rows, splits.val.num_rows) == (8, 12, 4)
    for table in (splits.source, splits.train, splits.val):
        assert table.schema.equals(RECORD_SCHEMA)
    assert [(c.id, c.name) for c in splits.categories] == list(CATEGORIES)
    ids = [i for t in (splits.source, splits.train, splits.val) for i in t.column("image_id").to_pylist()]
    assert len(set(ids)) == 24
    row = splits.train.to_pylist()[0]
    assert read_image(row["uri"]).shape == (row["height"], row["width"], 3) == (64, 64, 3)
    assert splits.content_hash == json.loads((drawn / "manifest.json").read_text())["sha256"]


def test_masks_are_visible_parts(drawn):
    splits = load(DataConfig(root=str(drawn), shapes=SMALL))[0]
    counts = []
    for row in splits.train.to_pylist():
        masks = [mask_utils.decode({"size": [64, 64], "counts": i["rle"]}) for i in row["instances"]]
        counts.append(len(masks))
        assert all(m.sum() >= LAYOUTS["scattered"].min_visible_px for m in masks)
        assert sum(masks).max(initial=0) <= 1  # what a later shape covers belongs to nobody else
    assert min(counts) >= 1 and max(counts) <= 5


def test_occlusion_happens():
    visible, alone = 0, 0
    for index in range(60):
        _, instances = draw_scene(STYLES["source"], np.random.SeedSequence([1, index]))
        for category, mask in instances:
            if category == 1:  # a disc fills pi/4 of its box unless something covers or cuts it
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                share = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
                visible, alone = visible + (share < 0.7), alone + (share >= 0.7)
    assert visible > 8 and alone > 8


def test_styles_differ():
    def roughness(style):
        images = [draw_scene(STYLES[style], np.random.SeedSequence([2, i]))[0].astype(float) for i in range(12)]
        return np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images])

    assert roughness("target") > 2 * roughness("source")


def test_hue_tells_classes_apart_but_not_surely():
    hues = {category: [] for category, _ in CATEGORIES}
    for index in range(80):
        image, instances = draw_scene(STYLES["target"], np.random.SeedSequence([3, index]))
        for category, mask in instances:
            r, g, b = image[mask].mean(0)
            hues[category].append(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))
    for k, (category, _) in enumerate(CATEGORIES):
        offset = np.angle(np.exp(1j * (np.array(hues[category]) - np.pi * k / 2)))
        assert abs(np.median(offset)) < 0.3
        assert 0.3 < offset.std() < 1.0  # sigma .1 of a turn is .63 rad


def test_same_seed_same_bytes_and_count_does_not_matter(drawn, tmp_path):
    shapes.draw(str(tmp_path / "again"), SMALL, num_processes=1)
    assert _contents(tmp_path / "again") == _contents(drawn)
    shapes.draw(str(tmp_path / "more"), SMALL.model_copy(update={"num_train": 14}), num_processes=1)
    more = _contents(tmp_path / "more")
    assert all(more[name] == content for name, content in _contents(drawn).items() if name.endswith(".png"))
    shapes.draw(str(tmp_path / "other"), SMALL.model_copy(update={"seed": -1}), num_processes=1)
    assert (tmp_path / "other/train/000000.png").read_bytes() != more["train/000000.png"]


def test_processes_do_not_change_the_bytes(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_MIN_SCENES_FOR_POOL", 0)
    calls = []
    shapes.draw(
        str(tmp_path / "pool"), SMALL, num_processes=2, progress=lambda done, total: calls.append((done, total))
    )
    assert _contents(tmp_path / "pool") == _contents(drawn)
    assert calls == [(8, 24), (20, 24), (24, 24)]


def test_cached_and_redrawn(drawn, tmp_path):
    root = tmp_path / "d"
    shapes.draw(str(root), SMALL.model_copy(update={"num_train": 20}), num_processes=1)
    assert (root / "train/000019.png").exists()
    shapes.draw(str(root), SMALL, num_processes=1)  # another config: drawn again, nothing left over
    assert _contents(root) == _contents(drawn)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    shapes.draw(str(root), SMALL, num_processes=1)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_interrupted_drawing_is_not_read_and_is_redrawn(drawn, tmp_path):
    class Killed(BaseException):
        pass

    def die(done, total):
        raise Killed

    root = tmp_path / "d"
    with pytest.raises(Killed):
        shapes.draw(str(root), SMALL, num_processes=1, progress=die)
    assert (root / "source/000000.png").exists() and not (root / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        load(DataConfig(root=str(root), shapes=SMALL))[0]
    shapes.draw(str(root), SMALL, num_processes=1)
    assert _contents(root) == _contents(drawn)


def test_broken_manifest_is_redrawn(drawn, tmp_path):
    root = tmp_path / "d"
    shapes.draw(str(root), SMALL, num_processes=1)
    (root / "manifest.json").write_text('{"format": "cast')
    shapes.draw(str(root), SMALL, num_processes=1)
    assert _contents(root) == _contents(drawn)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/000099.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files"):
        shapes.draw(str(tmp_path), SMALL, num_processes=1)
    assert list(_contents(tmp_path)) == ["train/000099.png"]


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.json.partial", "annotations/instances_train.json", "train/000000.png"]
)
@pytest.mark.parametrize("text", ['{"name": "my app"}', "[]", "not json"])
def test_a_folder_with_files_of_our_names_is_left_alone(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"^data\.root: .* holds other files: expected a folder .* empty or drawn before"
    ):
        shapes.draw(str(tmp_path), SMALL, num_processes=1)
    with pytest.raises(ValueError, match=r"^data\.root: .*photo\.jpg is a file"):
        shapes.draw(str(tmp_path / "photo.jpg"), SMALL, num_processes=1)
    assert sorted(_contents(tmp_path)) == sorted([name, "photo.jpg"]) and path.read_text() == text


def test_another_config_and_a_lost_image_are_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json: drawn with .*expected"):
        load(DataConfig(root=str(drawn)))[0]
    root = tmp_path / "d"
    shapes.draw(str(root), SMALL, num_processes=1)
    (root / "val/000001.png").unlink()
    with pytest.raises(ValueError, match=r"000001\.png.*missing"):
        load(DataConfig(root=str(root), shapes=SMALL))[0]


def test_folder_is_valid_input_of_the_coco_reader(drawn):
    ours = load(DataConfig(root=str(drawn), shapes=SMALL))[0]
    read = load(DataConfig(format="coco", root=str(drawn)))[0]
    assert read.train.equals(ours.train) and read.val.equals(ours.val)
    assert read.categories == ours.categories and read.skipped == ()


def test_uri_root(drawn, tmp_path):
    root = f"file://{tmp_path}/with%20space"
    shapes.draw(root, SMALL, num_processes=1)
    assert _contents(tmp_path / "with space") == _contents(drawn)
    splits = load(DataConfig(root=root, shapes=SMALL))[0]
    assert read_image(splits.val.to_pylist()[0]["uri"]).shape == (64, 64, 3)


def test_object_store_root(drawn):
    root = "mock:///bucket/a%20b?region=x"  # arrow's store in memory: no files, no rename
    shapes.draw(root, SMALL, num_processes=1)
    read = load(DataConfig(format="coco", root=root))[0]
    here = load(DataConfig(format="coco", root=str(drawn)))[0]
    assert read.content_hash == here.content_hash
    uri = read.train.to_pylist()[0]["uri"]
    assert uri == "mock:///bucket/a%20b/train/000000.png?region=x"
    np.testing.assert_array_equal(read_image(uri), read_image(str(drawn / "train/000000.png")))
    shapes.draw(root, SMALL, num_processes=1)
    assert load(DataConfig(root=root, shapes=SMALL))[0].val.num_rows == 4


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "a.json")
    write_bytes(path, b"old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.json": b"old"}


def test_drawing_needs_no_torch():
    code = "import sys, cast_ray.data.formats.shapes; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_crowded_scenes_are_of_one_class_that_touches(tmp_path):
    config = SMALL.model_copy(update={"layout": "crowded"})
    shapes.draw(str(tmp_path / "d"), config, num_processes=1)
    splits = load(DataConfig(root=str(tmp_path / "d"), shapes=config))[0]
    assert [c.name for c in splits.categories] == ["disc"]
    touching = total = 0
    for row in splits.train.to_pylist():
        assert (row["height"], row["width"]) == (128, 128) and len(row["instances"]) >= 3
        masks = [mask_utils.decode({"size": [128, 128], "counts": i["rle"]}).astype(bool) for i in row["instances"]]
        for mask in masks:
            around = np.zeros_like(mask)
            around[1:], around[:, 1:] = mask[:-1], mask[:, :-1]
            around[:-1] |= mask[1:]
            around[:, :-1] |= mask[:, 1:]
            touching += any((around & other).any() for other in masks if other is not mask)
        total += len(masks)
    assert touching > 0.9 * total
    with pytest.raises(ValueError, match="drawn with"):
        load(DataConfig(root=str(tmp_path / "d"), shapes=SMALL))


def test_a_layout_at_its_default_changes_no_stored_dataset(drawn):
    """Manifests of scattered scenes are as they were before there was a choice."""
    assert "layout" not in json.loads((drawn / "manifest.json").read_text())["config"]
