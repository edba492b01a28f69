"""Makes `cityscapes_reference.json`: small scenes and what cityscapesScripts' own tool measures on them.

The tool needs an older numpy than cast_ray, so it gets an environment of its own:

    python3.11 -m venv ENV && ENV/bin/pip install cityscapesScripts==2.2.4 numpy==1.23.5 pillow==9.5.0
    ENV/bin/python tests/data/cityscapes_reference.py

Each scene is an instanceIds map (raw ids as Cityscapes has them: class, group or void below 1000, instances from 1000
up) and detections; masks are run lengths down the columns, background first, as in uncompressed COCO RLE.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as tool
from PIL import Image

HEIGHT, WIDTH = 48, 96
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = CLASSES = (24, 25, 26, 27, 28, 31, 32, 33)
CARAVAN = 29  # a class, but not evaluated: its groups are void, its single instances are not
VOID, GROUND = (0, 1, 3, 4, 5, 9, 18, CARAVAN), (7, 11, 23)


def rectangle(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    height, width = rng.integers(low, high, 2)
    top, left = rng.integers(0, HEIGHT - min(height, HEIGHT) + 1), rng.integers(0, WIDTH - width + 1)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def draw_scene(rng: np.random.Generator, classes: tuple[int, ...], empty: bool) -> np.ndarray:
    """A map of raw ids: background, void patches, groups, large and small instances."""
    ids = np.full((HEIGHT, WIDTH), rng.choice(GROUND), dtype=np.int32)
    for _ in range(rng.integers(1, 4)):
        ids[rectangle(rng, 6, 30)] = rng.choice(VOID)
    if empty:
        return ids
    for _ in range(rng.integers(0, 3)):
        ids[rectangle(rng, 4, 25)] = rng.choice(classes)  # a group
    if rng.random() < 0.3:
        ids[rectangle(rng, 10, 20)] = CARAVAN * 1000
    for number in range(rng.integers(2, 9)):
        low, high = (3, 12) if rng.random() < 0.3 else (9, 30)  # below and above 100 pixels
        ids[rectangle(rng, low, high)] = rng.choice(classes) * 1000 + number
    return ids


def detect(rng: np.random.Generator, ids: np.ndarray, classes: tuple[int, ...], tied: bool) -> list[dict[str, Any]]:
    """Detections near objects, groups and void, some twice, some of another class, one in twenty empty."""
    found = []
    regions = [i for i in np.unique(ids).tolist() if i not in GROUND]
    for _ in range(rng.integers(0, 25)):
        if regions and rng.random() < 0.85:
            region = int(rng.choice(regions))
            mask = np.roll(ids == region, rng.integers(-2, 3, 2) * rng.integers(0, 2), (0, 1))
            mask &= rectangle(rng, 20, 48) if rng.random() < 0.3 else True
            label = region // 1000 if region >= 1000 else region
        else:
            mask, label = rectangle(rng, 4, 30), 0
        if label not in classes or rng.random() < 0.1:
            label = int(rng.choice(classes))
        mask &= rng.random() > 0.05
        score = rng.integers(1, 5) / 4 if tied else rng.random()
        found.append({"label": label, "score": float(score), "mask": mask})
    return found


def measure(folder: Path, scenes: list[tuple[np.ndarray, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Writes the files that the tool reads and runs it."""
    truths, predictions = [], []
    (folder / "masks").mkdir()
    for n, (ids, found) in enumerate(scenes):
        truth = folder / f"town_{n:06d}_000019_gtFine_instanceIds.png"
        Image.fromarray(ids.astype(np.uint16)).save(truth)
        lines = []
        for k, detection in enumerate(found):
            name = f"masks/{n}_{k}.png"
            Image.fromarray(detection["mask"].astype(np.uint8) * 255).save(folder / name)
            lines.append(f"{name} {detection['label']} {detection['score']!r}\n")
        text = folder / f"town_{n:06d}_000019.txt"
        text.write_text("".join(lines))
        truths.append(str(truth))
        predictions.append(str(text))
    tool.args.gtInstancesFile = str(folder / "gtInstances.json")
    tool.args.predictionPath = str(folder)
    tool.args.JSONOutput = False
    tool.args.quiet = True
    os.chdir(folder)
    numbers = tool.evaluateImgLists(predictions, truths, tool.args)
    averages = numbers["averages"]
    return {
        "classes": numbers["instLabels"],
        "ap": np.array(numbers["resultApMatrix"])[0].tolist(),
        "all_ap": averages["allAp"],
        "all_ap50": averages["allAp50%"],
    }


def runs(mask: np.ndarray) -> list[int]:
    flat = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def plain(ids: np.ndarray, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "regions": [{"id": i, "runs": runs(ids == i)} for i in np.unique(ids).tolist()],
        "detections": [d | {"mask": runs(d["mask"])} for d in found],
    }


def main() -> None:
    target = Path(__file__).resolve().with_suffix(".json")
    cases = []
    for seed, (name, num_images, truth_classes, found_classes, tied) in enumerate(
        [
            ("all classes", 12, CLASSES, CLASSES, False),
            ("tied scores", 12, CLASSES, CLASSES, True),
            ("two classes, crowded", 10, (PERSON, CAR), (PERSON, CAR), False),
            ("classes never found and never there", 8, (PERSON, RIDER, BUS), (RIDER, BUS, TRAIN, BICYCLE), False),
            ("one image", 1, (TRUCK, MOTORCYCLE), (TRUCK, MOTORCYCLE), True),
            ("nothing found", 2, (PERSON, CAR), (), False),
        ]
    ):
        rng = np.random.default_rng(seed)
        scenes = []
        for n in range(num_images):
            ids = draw_scene(rng, truth_classes, empty=n % 6 == 5)
            scenes.append((ids, detect(rng, ids, found_classes, tied) if found_classes else []))
        with tempfile.TemporaryDirectory() as folder:
            numbers = measure(Path(folder), scenes)
            os.chdir(target.parent)
        cases.append({"name": name, "scenes": [plain(*scene) for scene in scenes], "numbers": numbers})
    document = {"tool": "cityscapesScripts 2.2.4", "size": [HEIGHT, WIDTH], "void": list(VOID), "cases": cases}
    target.write_text(json.dumps(document, separators=(",", ":")).replace("NaN", "null") + "\n")


if __name__ == "__main__":
    main()
