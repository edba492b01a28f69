"""The embedded experiments `shapes` and `crowded`: scenes drawn in two styles, on disk as a COCO-format folder."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import posixpath
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import fs

from cast_ray.common.paths import absolute, join, make_folder, read_bytes, resolve, write_bytes
from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import read_annotations
from cast_ray.data.formats.scenes import DRAWING_VERSION, LAYOUTS, STYLES, Layout, draw_scene
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.reading.index import DatasetIndex, describe
from cast_ray.data.reading.listing import Listing
from cast_ray.recipe import DataConfig, ShapesConfig
from cast_ray.recipe.part import identity_of

MANIFEST, PARTIAL_MANIFEST = "manifest.json", "manifest.json.partial"
FORMAT = "cast_ray.shapes"
"""What a manifest says, so that another program's file of that name is none."""
FOR_SCENES = (
    "that is missing, empty or drawn before, for the scenes that data.format=shapes draws (--preset coco and the like "
    "read images of your own)"
)
_SPLITS = ("source", "train", "val")
_CHUNK = 50
_MIN_SCENES_FOR_POOL = 600
"""Below this a pool's start-up (0.6 s for two processes) costs more than it saves."""


def draw(
    root: str,
    config: ShapesConfig,
    num_processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draws the dataset, or returns at once where it is already drawn.

    Writes `source/`, `train/`, `val/` with one PNG a scene, `annotations/instances_<split>.json` and, last of all,
    `manifest.json` with the config, the counts and a sha256 over everything: a folder without it is drawn again. A
    scene depends on (seed, split, index) alone: not on the number of processes, nor on the number of scenes.

    Args:
        root: local folder or pyarrow.fs URI.
        config: how many scenes, and the seed.
        num_processes: processes that draw; 1 draws in this one. New processes are spawned, so a script that calls this
            needs the usual `if __name__ == "__main__":`.
        progress: called in this process with (scenes drawn, scenes in all).

    Raises:
        ValueError: the folder holds other files and no trace of an earlier drawing; nothing is written.
        OSError: the folder cannot be written.
    """
    root = absolute(root)
    manifest = {"format": FORMAT, "drawing_version": DRAWING_VERSION, "config": identity_of(config)}
    if _is_drawn(root, manifest):
        return
    filesystem, base = resolve(root)
    _check_ours(filesystem, base, root)
    make_folder(filesystem, base)
    # The marker says whose folder this is; it turns into the manifest when everything else is there.
    write_bytes(join(root, PARTIAL_MANIFEST), json.dumps(manifest).encode())
    _delete(filesystem, posixpath.join(base, MANIFEST))
    counts = {"source": config.num_source, "train": config.num_train, "val": config.num_val}
    for folder in (*_SPLITS, "annotations"):
        make_folder(filesystem, posixpath.join(base, folder))

    layout = LAYOUTS[config.layout]
    tasks = [
        (root, config.seed, layout, split, start, min(start + _CHUNK, counts[split]))
        for split in _SPLITS
        for start in range(0, counts[split], _CHUNK)
    ]
    total, done = sum(counts.values()), 0
    digest = hashlib.sha256()
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in _SPLITS}
    for (_, _, _, split, start, stop), (chunk_sha256, scenes) in zip(tasks, _run(tasks, num_processes, total)):
        digest.update(chunk_sha256)
        annotations[split].extend(scenes)
        done += stop - start
        if progress is not None:
            progress(done, total)
    for split in _SPLITS:
        content = json.dumps(_coco_document(split, annotations[split], layout)).encode()
        digest.update(content)
        write_bytes(join(root, f"annotations/instances_{split}.json"), content)
        _delete_leftovers(filesystem, posixpath.join(base, split), counts[split])
    manifest |= {"counts": counts, "sha256": digest.hexdigest()}
    write_bytes(join(root, MANIFEST), json.dumps(manifest, indent=1).encode())
    _delete(filesystem, posixpath.join(base, PARTIAL_MANIFEST))


def index(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> DatasetIndex:
    """Reads the annotations of a folder that `draw` has finished; its own sha256 vouches for the images.

    Raises:
        ValueError: the folder is not drawn, or drawn for another config; the message names both.
    """
    root = absolute(config.root)
    manifest = _read_manifest(root)
    if manifest is None:
        raise ValueError(f"data.root: {config.root or root} holds no drawn scenes (no {MANIFEST})")
    expected = identity_of(config.shapes)
    if manifest.get("config") != expected or manifest.get("drawing_version") != DRAWING_VERSION:
        raise ValueError(
            f"{join(root, MANIFEST)}: drawn with {manifest.get('config')} version {manifest.get('drawing_version')}: "
            f"expected {expected} version {DRAWING_VERSION}"
        )
    if config.unlabelled_pool != "rest":
        raise ValueError(f"data.unlabelled_pool={config.unlabelled_pool}: drawn scenes have no extra unlabelled images")
    listing = Listing(root)
    read = {s: read_annotations(listing, f"annotations/instances_{s}.json", [s], config, s) for s in _SPLITS}
    skipped = [entry for split in _SPLITS for entry in read[split].skipped]
    if skipped:
        raise ValueError(f"{root}: {describe(skipped)}: expected the scenes as drawn, delete the folder to draw again")
    return DatasetIndex(
        splits={split: read[split].table for split in ("train", "val", "source")},
        categories=tuple(Category(identifier, name) for identifier, name in LAYOUTS[config.shapes.layout].categories),
        listing=listing,
        num_annotations={split: read[split].num_annotations for split in _SPLITS},
        content_hash=manifest["sha256"],
    )


def _run(tasks: list[tuple], num_processes: int, total: int) -> Iterator[tuple[bytes, list[dict[str, Any]]]]:
    """The chunks' results in the order of the tasks."""
    if num_processes <= 1 or total < _MIN_SCENES_FOR_POOL:
        yield from map(_draw_chunk, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs Ray's or arrow's threads can hang
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield from pool.map(_draw_chunk, tasks)


def _draw_chunk(task: tuple[str, int, Layout, str, int, int]) -> tuple[bytes, list[dict[str, Any]]]:
    """Draws and writes scenes start..stop of a split: the sha256 of their files, and what the annotations say."""
    root, seed, layout, split, start, stop = task
    style = STYLES["source" if split == "source" else "target"]
    split_index = _SPLITS.index(split)
    digest = hashlib.sha256()
    scenes = []
    for index in range(start, stop):
        entropy = [seed % 2**64, split_index, index]
        pixels, instances = draw_scene(style, np.random.SeedSequence(entropy), layout)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        digest.update(buffer.getbuffer())
        write_bytes(join(root, f"{split}/{_file_name(index)}"), buffer.getvalue())
        scenes.append(
            {
                "id": index * len(_SPLITS) + split_index + 1,
                "index": index,
                "instances": [_coco_instance(category, mask) for category, mask in instances],
            }
        )
    return digest.digest(), scenes


def _coco_instance(category: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": category,
        "segmentation": {"size": list(mask.shape), "counts": encode_mask(mask).decode("ascii")},
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
    }


def _coco_document(split: str, scenes: list[dict[str, Any]], layout: Layout) -> dict[str, Any]:
    instances = [(scene["id"], instance) for scene in scenes for instance in scene["instances"]]
    return {
        "info": {"description": f"drawn scenes, {split}"},
        "categories": [{"id": identifier, "name": name} for identifier, name in layout.categories],
        "images": [
            {"id": s["id"], "file_name": _file_name(s["index"]), "width": layout.scene_px, "height": layout.scene_px}
            for s in scenes
        ],
        "annotations": [{"id": n, "image_id": i, **instance} for n, (i, instance) in enumerate(instances, start=1)],
    }


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


def _read_manifest(root: str, name: str = MANIFEST) -> dict[str, Any] | None:
    try:
        manifest = json.loads(read_bytes(join(root, name)))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _is_drawn(root: str, expected: dict[str, Any]) -> bool:
    manifest = _read_manifest(root)
    return manifest is not None and "sha256" in manifest and expected.items() <= manifest.items()


def _check_ours(filesystem: fs.FileSystem, base: str, root: str) -> None:
    """Refuses a folder that an earlier drawing has not made: only scenes of one's own are drawn over."""
    if filesystem.get_file_info(base).type == fs.FileType.File:
        raise ValueError(f"data.root: {root} is a file: expected a folder {FOR_SCENES}")
    listed = {i.base_name for i in filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))}
    notes = [_read_manifest(root, name) for name in (MANIFEST, PARTIAL_MANIFEST) if name in listed]
    is_broken = notes == [None] and listed <= {MANIFEST, PARTIAL_MANIFEST, "annotations", *_SPLITS}
    if listed and not is_broken and not any(note and note.get("format") == FORMAT for note in notes):
        raise ValueError(f"data.root: {root} holds other files: expected a folder {FOR_SCENES}")


def _delete(filesystem: fs.FileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        filesystem.delete_file(path)


def _delete_leftovers(filesystem: fs.FileSystem, folder: str, count: int) -> None:
    """Removes scenes of an earlier, larger drawing, which no annotation file names."""
    for info in filesystem.get_file_info(fs.FileSelector(folder)):
        stem, _, suffix = info.base_name.partition(".")
        if suffix == "png" and stem.isdigit() and int(stem) >= count:
            filesystem.delete_file(info.path)
