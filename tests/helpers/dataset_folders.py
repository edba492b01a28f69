"""Small datasets in their owners' own encodings, written for tests."""

from __future__ import annotations

from pathlib import Path

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
