"""Images as a user names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cast_ray.datasets.photos import find_images, output_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.JPG", "a/1.png", "a/1.jpg", "a/notes.txt", "c d/3 [x].webp", "top.tif", "raw.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(paths: list[str], folder: Path) -> list[str]:
    return [str(Path(p).relative_to(folder)) for p in paths]


def test_a_folder_gives_every_image_below_it(folder: Path) -> None:
    assert names(find_images([str(folder)]), folder) == ["a/1.jpg", "a/1.png", "b/2.JPG", "c d/3 [x].webp", "top.tif"]


def test_files_are_taken_as_given_and_once(folder: Path) -> None:
    sources = [str(folder / "raw.dat"), str(folder / "a"), str(folder / "a" / "1.png"), str(folder / "c d/3 [x].webp")]
    assert names(find_images(sources), folder) == ["raw.dat", "a/1.jpg", "a/1.png", "c d/3 [x].webp"]


def test_patterns(folder: Path) -> None:
    assert names(find_images([f"{folder}/*/*.*g"]), folder) == ["a/1.jpg", "a/1.png"]
    assert names(find_images([f"{folder}/**/*.webp"]), folder) == ["c d/3 [x].webp"]


def test_uris(folder: Path) -> None:
    found = find_images([f"file://{folder}/a"])
    assert found == [f"file://{folder}/a/1.jpg", f"file://{folder}/a/1.png"]
    assert find_images([f"file://{folder}/b/2.JPG"]) == [f"file://{folder}/b/2.JPG"]


@pytest.mark.parametrize("source", ["gone", "gone/*.png", "file:///gone"])
def test_what_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=rf"no image in '{source.replace('*', '.')}'"):
        find_images([source])


def test_output_names_are_unique_and_stay_below_their_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = find_images([str(folder)])
    assert output_names(paths) == ["a/1.jpg", "a/1.png", "b/2", "c d/3 [x]", "top"]
    assert output_names(paths[:1]) == ["1"]
    monkeypatch.chdir(folder / "b")
    assert output_names(["../a/1.jpg", "2.JPG"]) == ["a/1", "b/2"]
    assert output_names(["s3://bucket/x/1.jpg", "s3://bucket/y/1.jpg"]) == ["x/1", "y/1"]
