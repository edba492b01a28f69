"""Images as a user names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cast_ray.common.paths import resolve
from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.index import index_pool
from cast_ray.data.reading.listing import Listing, state_of
from cast_ray.data.reading.photos import describe_left_out, find_photos, images_below, output_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.JPG", "a/1.png", "a/1.jpg", "a/notes.txt", "c d/3 [x].webp", "top.tif", "raw.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(paths: list[str], folder: Path) -> list[str]:
    return [str(Path(p).relative_to(folder)) for p in paths]


def test_a_folder_gives_every_image_below_it(folder: Path) -> None:
    assert names(find_photos([str(folder)]).paths, folder) == [
        "a/1.jpg",
        "a/1.png",
        "b/2.JPG",
        "c d/3 [x].webp",
        "top.tif",
    ]


def test_files_are_taken_as_given_and_once(folder: Path) -> None:
    sources = [str(folder / "raw.dat"), str(folder / "a"), str(folder / "a" / "1.png"), str(folder / "c d/3 [x].webp")]
    assert names(find_photos(sources).paths, folder) == ["raw.dat", "a/1.jpg", "a/1.png", "c d/3 [x].webp"]


def test_patterns(folder: Path) -> None:
    assert names(find_photos([f"{folder}/*/*.*g"]).paths, folder) == ["a/1.jpg", "a/1.png"]
    assert names(find_photos([f"{folder}/**/*.webp"]).paths, folder) == ["c d/3 [x].webp"]


def test_uris(folder: Path) -> None:
    found = find_photos([f"file://{folder}/a"]).paths
    assert found == [f"file://{folder}/a/1.jpg", f"file://{folder}/a/1.png"]
    assert find_photos([f"file://{folder}/b/2.JPG"]).paths == [f"file://{folder}/b/2.JPG"]


@pytest.mark.parametrize("source", ["gone", "gone/*.png", "file:///gone"])
def test_what_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=rf"no image in '{source.replace('*', '.')}'"):
        find_photos([source])


def test_output_names_are_unique_and_stay_below_their_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = find_photos([str(folder)]).paths
    assert output_names(paths) == ["a/1.jpg", "a/1.png", "b/2", "c d/3 [x]", "top"]
    assert output_names(paths[:1]) == ["1"]
    monkeypatch.chdir(folder / "b")
    assert output_names(["../a/1.jpg", "2.JPG"]) == ["a/1", "b/2"]
    assert output_names(["s3://bucket/x/1.jpg", "s3://bucket/y/1.jpg"]) == ["x/1", "y/1"]


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Five photographs among what cameras, desktops, notebooks and storage devices leave beside them."""
    for name in ("1.jpg", "2.JPEG", "day/3.png", "day/4.jfif", "day/late/5.avif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("6.heic", "7.HEIC", "notes.txt", "README", "._1.jpg", ".hidden/8.jpg", ".ipynb_checkpoints/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("day/@eaDir/3.png", "__MACOSX/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


FIVE = ["1.jpg", "2.JPEG", "day/3.png", "day/4.jfif", "day/late/5.avif"]
LEFT_OUT = {
    **{".heic": 2, ".txt": 1, "files without suffix": 1, "hidden files": 1, "folders called .hidden": 1},
    **{"folders called .ipynb_checkpoints": 1, "folders called @eaDir": 1, "folders called __MACOSX": 1},
}


def test_what_is_left_out_is_counted(messy: Path) -> None:
    for source, prefix in ((str(messy), f"{messy}/"), (f"file://{messy}/", f"file://{messy}/")):
        found = find_photos([source])
        assert found.paths == [prefix + name for name in FIVE] and found.left_out == LEFT_OUT
    assert describe_left_out(found.left_out) == (
        ".heic: 2 (cannot be read: convert to JPEG or PNG), .txt: 1, files without suffix: 1, folders called .hidden: "
        "1, folders called .ipynb_checkpoints: 1, folders called @eaDir: 1, folders called __MACOSX: 1, hidden files: 1"
    )
    with pytest.raises(ValueError, match=r"no image in '.*/\*\.heic' \(left out: \.heic: 1 \(cannot be read: convert"):
        find_photos([f"{messy}/*.heic"])
    assert find_photos([str(messy / ".hidden")]).paths == [f"{messy}/.hidden/8.jpg"]  # as it was asked for
    assert names(find_photos([f"{messy}/**/*"]).paths, messy) == FIVE


def test_links_are_followed_and_nothing_is_taken_twice(messy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "9.jpg").write_bytes(b"x")
    (messy / "album").symlink_to(elsewhere)
    (messy / "a loop").symlink_to(messy)
    (messy / "day/late/up").symlink_to("../..")
    (messy / "album/back").symlink_to(messy / "day")
    (messy / "0.jpg").symlink_to(messy / "day/3.png")
    (messy / "ten.png").symlink_to(elsewhere / "gone.png")
    (messy / "nowhere").symlink_to("nowhere")
    found = find_photos([str(messy)])
    assert names(found.paths, messy) == sorted([*FIVE, "album/9.jpg"])
    assert found.left_out == LEFT_OUT | {
        "links to images that were found": 1,
        "broken links": 2,
    }
    for pattern in (f"{messy}/**/*.*", f"{messy}/**/*"):
        assert names(find_photos([pattern]).paths, messy) == sorted([*FIVE, "album/9.jpg"])
    (messy / "linked").symlink_to(messy / "day")
    assert names(find_photos([str(messy / "linked")]).paths, messy)[0] == "linked/3.png"


def test_a_folder_can_be_closed(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(messy)
    (messy / "results").symlink_to("day/late")
    for closed in ("day/late", "results", str(messy / "day/late"), f"file://{messy}/day/late/"):
        assert find_photos(["."], [closed]).paths == ["./1.jpg", "./2.JPEG", "./day/3.png", "./day/4.jfif"]
    assert find_photos(["**/*.avif", "1.jpg"], ["nothing"]).paths == ["day/late/5.avif", "1.jpg"]
    for source in ("**/*.avif", "day/late"):
        with pytest.raises(ValueError, match=r"no image in '.*' \(what is in .*/day/late is not read\): expected"):
            find_photos([source], ["day/late"])


@pytest.mark.parametrize("beside", [["instances.json"], ["results.json", "images.json"], ["unfinished.jsonl"]])
def test_drawn_results_are_not_read(messy: Path, beside: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `label` and `predict`, finished or not; a folder that only has the same name is read."""
    for name in ("labels/overlays/1.png", "labels/overlays/day/3.png", "overlays/mine.png", "labels/new.png"):
        (messy / name).parent.mkdir(parents=True, exist_ok=True)
        (messy / name).write_bytes(b"x")
    for name in beside[:-1]:
        (messy / "labels" / name).write_bytes(b"x")
    assert len(find_photos([str(messy)]).paths) == 9  # without the last of the files it is any folder
    (messy / "labels" / beside[-1]).write_bytes(b"x")
    wanted = sorted([*FIVE, "overlays/mine.png", "labels/new.png"])
    for source in (str(messy), f"file://{messy}"):
        found = find_photos([source])
        assert [path.removeprefix(f"{source}/") for path in found.paths] == wanted
        assert "folders of drawn results (overlays): 1" in describe_left_out(found.left_out)
    table, left_out = index_pool(Listing(str(messy.parent)), messy.name)
    assert [decode_image_id(i) for i in table.column("image_id").to_pylist()] == wanted
    assert left_out["folders of drawn results (overlays)"] == 1

    monkeypatch.chdir(messy)
    for pattern in ("**/*.png", "*/*/*"):
        found = find_photos([pattern, "1.jpg"])
        assert not any(path.startswith("labels/overlays") for path in found.paths)
        assert found.left_out["folders of drawn results (overlays)"] == 1
    for asked in ("labels/overlays", "labels/overlays/1.png", "labels/overlays/*.png"):  # by its name
        assert "labels/overlays/1.png" in find_photos([asked]).paths


def test_one_rule_for_pools_and_commands(messy: Path) -> None:
    found = images_below(Listing(str(messy)), "day")
    assert found.paths == ["day/3.png", "day/4.jfif", "day/late/5.avif"] and found.left_out == {
        "folders called @eaDir": 1
    }
    table, left_out = index_pool(Listing(str(messy.parent)), f"{messy.name}/")
    assert [decode_image_id(i) for i in table.column("image_id").to_pylist()] == FIVE and left_out == LEFT_OUT
    with pytest.raises(ValueError, match=r"no image below \.hidden/deep in .* \(left out: \.heic: 1"):
        (messy / ".hidden/deep").mkdir()
        (messy / ".hidden/deep/x.heic").write_bytes(b"x")
        index_pool(Listing(str(messy)), ".hidden/deep")


def test_names_in_another_encoding_are_counted(messy: Path) -> None:
    Path(os.fsdecode(os.fsencode(messy) + b"/caf\xe9.jpg")).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(messy) + b"/\xe9t\xe9")).mkdir()
    found = find_photos([str(messy)])
    assert names(found.paths, messy) == FIVE and found.left_out == LEFT_OUT | {"names that are not UTF-8": 2}
    assert names(find_photos([f"{messy}/*.jpg", f"{messy}/**/*.png"]).paths, messy) == ["1.jpg", "day/3.png"]


def test_an_object_store() -> None:
    root = "mock:///photographs"  # arrow's store in memory
    filesystem, base = resolve(root)
    for name in ("b.jpg", "a/c.avif", "a/.x.jpg", "@eaDir/b.jpg", "notes.txt", "out/d.png"):
        filesystem.create_dir(f"{base}/{name}".rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(f"{base}/{name}") as file:
            file.write(b"x")
    found = find_photos([root], [f"{root}/out"])
    assert found.paths == [f"{root}/a/c.avif", f"{root}/b.jpg"]
    assert found.left_out == {".txt": 1, "hidden files": 1, "folders called @eaDir": 1}
    listing = Listing(root)
    assert index_pool(listing, "a")[0].column("uri").to_pylist() == [f"{root}/a/c.avif"]
    before = listing.state()
    assert state_of(root, listing.seen) == before
    with filesystem.open_output_stream(f"{base}/a/c.avif") as file:
        file.write(b"longer")
    assert state_of(root, listing.seen) != before
