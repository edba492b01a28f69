"""Small datasets in their owners' own encodings, written for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32


def random_image(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def boxes(rng: np.random.Generator, count: int) -> list[tuple[slice, slice]]:
    """Rectangles that do not touch: one in each column of the image."""
    step = WIDTH // count
    return [
        (slice(*sorted(rng.choice(HEIGHT, 2, replace=False))), slice(i * step, (i + 1) * step - 1))
        for i in range(count)
    ]


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def cityscapes_map(rng: np.random.Generator) -> np.ndarray:
    """An instanceIds map, uint16 [H, W]: road, the own bonnet, two cars, a person, a group of bicycles, a caravan."""
    values = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)
    values[-1] = 1
    for value, box in zip((26000, 26001, 24000, 33, 29000), boxes(rng, 5)):
        values[box] = value
    return values


def write_cityscapes(root: Path, num_train: int = 8, num_val: int = 4, num_extra: int = 0) -> Path:
    """leftImg8bit and gtFine of two cities for training and one for validation."""
    rng = np.random.default_rng(0)
    for split, cities, count in (("train", ("aachen", "ulm"), num_train), ("val", ("lindau",), num_val)):
        for i in range(count):
            city = cities[i % len(cities)]
            frame = f"{city}/{city}_{i:06d}_000019"
            write_png(root / f"leftImg8bit/{split}/{frame}_leftImg8bit.png", np.asarray(random_image(rng)))
            write_png(root / f"gtFine/{split}/{frame}_gtFine_instanceIds.png", cityscapes_map(rng))
            write_png(root / f"gtFine/{split}/{frame}_gtFine_labelIds.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    for i in range(num_extra):
        frame = f"augsburg/augsburg_{i:06d}_000019"
        write_png(root / f"leftImg8bit/train_extra/{frame}_leftImg8bit.png", np.asarray(random_image(rng)))
    return root


def write_ade20k(root: Path, num_train: int = 8, num_val: int = 4) -> Path:
    """The Places challenge: R is the class 1..100, G the instance, which is unique in the image."""
    rng = np.random.default_rng(1)
    for split, name, count in (("training", "train", num_train), ("validation", "val", num_val)):
        for i in range(count):
            stem = f"ADE_{name}_{i + 1:08d}"
            values = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            for number, (label, box) in enumerate(zip((4, 4, 9, 100), boxes(rng, 4)), start=1):
                values[box] = (label, number, 0)
            write_png(root / f"annotations_instance/{split}/{stem}.png", values)
            (root / f"images/{split}").mkdir(parents=True, exist_ok=True)
            random_image(rng).save(root / f"images/{split}/{stem}.jpg")
    return root


FULL_CLASSES = {"wall": 2978, "person": 1831, "car": 401, "flag": 954}
"""Names of the full dataset -> their numbers; of a wall there are no instances in the benchmark."""


def write_ade20k_full(root: Path, num_train: int = 6, num_val: int = 2) -> Path:
    """ADE20K_2021_17_01: class R // 10 * 256 + G, instance B, scenes in folders, amodal masks in a folder per image."""
    rng = np.random.default_rng(2)
    base = root / "ADE20K_2021_17_01/images/ADE"
    for split, name, count in (("training", "train", num_train), ("validation", "val", num_val)):
        for i in range(count):
            folder = base / split / ("urban/street" if i % 2 else "home_or_hotel")
            stem = f"ADE_{name}_{i + 1:08d}"
            values = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            for number, (label, box) in enumerate(zip(("wall", "person", "person", "car"), boxes(rng, 4)), start=1):
                values[box] = (FULL_CLASSES[label] // 256 * 10, FULL_CLASSES[label] % 256, number)
            write_png(folder / f"{stem}_seg.png", values)
            write_png(folder / stem / f"instance_000_{stem}.png", np.zeros((HEIGHT, WIDTH), np.uint8))
            random_image(rng).save(folder / f"{stem}.jpg")
    return root


ObjectMaps = dict[str, np.ndarray]
"""Name of an image -> its label map, uint16 [H, W]: 0, or the number of the object."""


def object_maps(count: int = 6, prefix: str = "cell") -> ObjectMaps:
    """Three objects in each image, numbered with gaps; the first is an L, so that a box is not enough."""
    rng = np.random.default_rng(7)
    maps = {}
    for number in range(count):
        values = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
        for value, left in ((1, 1), (7, 12), (300, 22)):
            top, bottom = int(rng.integers(1, 6)), int(rng.integers(12, 22))
            values[top:bottom, left : left + 8] = value
        values[:8, 5:9] = np.where(values[:8, 5:9] == 1, 0, values[:8, 5:9])
        maps[f"{prefix}{number}"] = values
    return maps


def image_of(name: str) -> np.ndarray:
    """Pixels of an image that differ from name to name, uint8 [H, W, 3]."""
    return np.asarray(random_image(np.random.default_rng(list(name.encode()))))


def write_stardist(root: Path, maps: ObjectMaps, suffix: str = ".tif") -> Path:
    """images/ and masks/ with files of equal names; the label maps have 16 bits."""
    for name, values in maps.items():
        write_png(root / f"images/{name}{suffix}", image_of(name))
        write_png(root / f"masks/{name}{suffix}", values)
    return root


def write_cellpose(root: Path, maps: ObjectMaps, image: str = "_img", mask: str = "_masks") -> Path:
    """x_img.png beside x_masks.png, and the other files that Cellpose leaves there."""
    for name, values in maps.items():
        write_png(root / f"{name}{image}.png", image_of(name))
        write_png(root / f"{name}{mask}.png", values)
        (root / f"{name}{image}_seg.npy").write_bytes(b"npy")
    return root


def write_mask_files(root: Path, maps: ObjectMaps) -> Path:
    """A folder for each image, as in stage1_train.zip of the 2018 Data Science Bowl."""
    for name, values in maps.items():
        write_png(root / name / f"images/{name}.png", image_of(name))
        for value in np.unique(values[values > 0]):
            write_png(root / name / f"masks/{name}-{value}.png", np.where(values == value, 255, 0).astype(np.uint8))
    return root


def polygon_of(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """Corners of a box of pixels as [x, y]: the last column and row are right - 1 and bottom - 1."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def labelme_shape(label: str, points: list[list[float]], shape_type: str = "polygon", **fields: Any) -> dict[str, Any]:
    """A shape with the keys of labelme 6."""
    usual = {"group_id": None, "description": "", "flags": {}, "mask": None}
    return {"label": label, "points": points, "shape_type": shape_type} | usual | fields


def write_labelme(root: Path, shapes: dict[str, list[dict[str, Any]]], **fields: Any) -> Path:
    """An image and a JSON file with the keys of labelme 6 for each name; `fields` of all JSON files."""
    for name, listed in shapes.items():
        write_png(root / f"{name}.png", image_of(name))
        document = {"version": "6.3.1", "flags": {}, "shapes": listed, "imagePath": f"{name}.png", "imageData": None}
        size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (root / f"{name}.json").write_text(json.dumps(document | size | fields, ensure_ascii=False, indent=2))
    return root


def write_yolo(root: Path, lines: dict[str, str | None], split: str = "train", images: str = "images/{split}") -> Path:
    """Images and, where the lines of one are not None, its text file."""
    for name, text in lines.items():
        folder = images.format(split=split)
        write_png(root / folder / f"{name}.png", image_of(name))
        labels = root / f"/{folder}".replace("/images", "/labels").removeprefix("/")
        labels.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (labels / f"{name}.txt").write_text(text)
    return root


def yolo_line(label: int, points: list[list[float]]) -> str:
    """A line of YOLO's segmentation format."""
    shares = (f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)
    return f"{label} {' '.join(shares)}"
