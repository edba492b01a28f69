"""Text files of users: every encoding that says which one it is, and one line with the file's name for the others."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
from dataset_folders import random_image

from cast_ray.common.text_files import read_text
from cast_ray.contracts.records import Category
from cast_ray.data.reading.class_lists import read_classes
from cast_ray.data.reading.reader import load
from cast_ray.data.splits.label_lists import read_list
from cast_ray.plan.ablation import load_table
from cast_ray.recipe import DataConfig

TEXT = "person\nGroßer Bär\n"
ENCODINGS = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-32": lambda text: text.encode("utf-32"),
}
NOT_TEXT = {
    "Latin-1": (TEXT.encode("latin-1"), "not UTF-8 text (line 2 holds the byte 0xDF, which is 'ß' in Latin-1): save"),
    "half a character": ("x".encode("utf-16") + b"y", "not a text file"),
    "binary": (b"GIF89a\x00\x00", "not a text file (it holds zero bytes)"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_text_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    write = ENCODINGS[encoding]
    path = tmp_path / "x.txt"
    path.write_bytes(write(TEXT))
    assert read_text(str(path), "x") == TEXT == read_text(f"file://{path}", "x")
    assert read_classes(str(path)) == [Category(1, "person"), Category(2, "Großer Bär")]
    assert read_list(str(path)).names == ("person", "Großer Bär")

    path.write_bytes(write(json.dumps(["person", "dog"])))
    assert read_classes(str(path)) == [Category(1, "person"), Category(2, "dog")]
    assert read_list(str(path)).names == ("person", "dog")

    categories = [{"id": 7, "name": "person"}, {"id": 3, "name": "dog"}]
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(4)]
    images = [{"id": i, "file_name": name, "height": 24, "width": 32} for i, name in enumerate(names)]
    for name in names:
        random_image(rng).save(tmp_path / name)
    document = {"images": images, "annotations": [], "categories": categories}
    (tmp_path / "instances.json").write_bytes(write(json.dumps(document)))
    assert read_classes(str(tmp_path / "instances.json")) == [Category(7, "person"), Category(3, "dog")]
    assert read_list(str(tmp_path / "instances.json")).names == tuple(names)
    assert load(DataConfig(format="coco", root=str(tmp_path)))[0].categories == (
        Category(7, "person"),
        Category(3, "dog"),
    )

    table = tmp_path / "mine.yaml"
    table.write_bytes(
        write("title: t\nmetric: student/mask_ap\nbaseline: a\nrows: {a: {}, ü: {loss.lambda_semi: 1}}\n")
    )
    assert list(load_table(table).rows) == ["a", "ü"]


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_no_text_is_one_line_with_the_name(tmp_path: Path, kind: str) -> None:
    content, message = NOT_TEXT[kind]
    for name, read in (
        ("names.txt", lambda path: read_classes(path)),
        ("list.txt", lambda path: read_list(path)),
        ("table.yaml", lambda path: load_table(path)),
        ("instances.json", lambda path: load(DataConfig(format="coco", root=str(Path(path).parent)))),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(str(tmp_path / name))
        assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            r"categories[1].id is 1 for the second time",
        ),
        ('{"categories": [{"id": "x", "name": "a"}]}', "categories[0].id is 'x': expected a 64-bit integer"),
        ('{"categories": []}', "'categories' is empty"),
        ('{"images": []}', "expected names with commas"),
        ('["a", 3]', "expected names with commas"),
        ('["a", "b", "a"]', "'a' is there twice"),
        ("[]", "expected names with commas"),
        ("", "not JSON"),
        ('{"categories": ', "not JSON"),
    ],
)
def test_json_that_holds_no_classes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_classes(str(path))
    assert message in str(error.value) and "--classes" in str(error.value) and "\n" not in str(error.value)


def test_a_message_never_repeats_a_whole_file(tmp_path: Path) -> None:
    from cast_ray.contracts.records import RECORD_SCHEMA
    from cast_ray.data.splits.fractions import LabelSource, label_index, split

    path = tmp_path / "list.txt"
    path.write_text("x" * 100_000)
    records = label_index(RECORD_SCHEMA.empty_table())
    config = DataConfig(label_family="list", label_list=str(path))
    with pytest.raises(ValueError, match="are no training images of the dataset: xxx") as error:
        split(records, config, 0, LabelSource(label_list=read_list(str(path))))
    assert len(str(error.value)) < 400
