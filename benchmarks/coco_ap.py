"""COCO mask AP at the size of val2017, from files to the numbers: 5,000 images x 100 detections x 80 classes.

    python benchmarks/coco_ap.py [--quick]

Ours reads the records (Parquet) and the results of an evaluation (JSON) and keeps the matches of every detection; the
rival, hotcoco, reads the instances (JSON) and the same results. Each run has a process of its own; measured are the CPU
seconds of all its threads and how far its resident memory grows, both without imports. The runs take turns. The AP must
be equal to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from measure import memory_growth_mb, report, spread
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.evaluation.coco_ap import mask_ap
from cast_ray.evaluation.coco_results import read_results, results_document, results_lines

NUM_IMAGES, NUM_DETECTIONS, NUM_CLASSES, SIZE = 5000, 100, 80, (480, 640)
CATEGORIES = tuple(Category(k, f"class {k}") for k in range(1, NUM_CLASSES + 1))
NUM_FAMILIES, NUM_LIKE = 250, 25


def make_masks(rng: np.random.Generator) -> list[list[dict[str, Any]]]:
    """Families of ellipses that are almost the same, 8 to 320 pixels across, as RLE."""
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    families = []
    for _ in range(NUM_FAMILIES):
        radii, centre = np.exp(rng.uniform(np.log(4), np.log(160), 2)), rng.uniform(8, np.array(SIZE) - 8)
        family = []
        for _ in range(NUM_LIKE):
            (b, a), (cy, cx) = radii * rng.uniform(0.8, 1.25, 2), centre + rng.uniform(-0.1, 0.1, 2) * radii
            mask = ((y - cy) / b) ** 2 + ((x - cx) / a) ** 2 < 1
            family.append(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))
        families.append(family)
    return families


def write_problem(folder: Path, num_images: int) -> None:
    """records.parquet, instances.json and results.json: 7 objects an image on average, most detections near one."""
    rng = np.random.default_rng(0)
    families = make_masks(rng)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with (folder / "results.json").open("wb") as file:
        lines = []
        for image in range(1, num_images + 1):
            own = rng.integers(NUM_FAMILIES, size=rng.integers(1, 14))
            labels = rng.integers(1, NUM_CLASSES + 1, len(own))
            instances = []
            for family, label in zip(own.tolist(), labels.tolist()):
                rle = families[family][0]
                instance = {"category_id": label, "rle": rle["counts"], "score": 1.0, "is_crowd": False}
                area = float(coco_mask.area(rle))
                instances.append(instance | {"area": area})
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
                        "area": area,
                        "bbox": coco_mask.toBbox(rle).tolist(),
                        "iscrowd": 0,
                    }
                )
            record = {"image_id": encode_image_id(image), "uri": "", "height": SIZE[0], "width": SIZE[1]}
            rows.append(record | {"instances": instances})
            near, right = rng.random(NUM_DETECTIONS) < 0.6, rng.random(NUM_DETECTIONS) < 0.9
            chosen = rng.integers(len(own), size=NUM_DETECTIONS)
            family_of = np.where(near, own[chosen], rng.integers(NUM_FAMILIES, size=NUM_DETECTIONS))
            label_of = np.where(right, labels[chosen], rng.integers(1, NUM_CLASSES + 1, NUM_DETECTIONS))
            variant, score = rng.integers(NUM_LIKE, size=NUM_DETECTIONS), rng.random(NUM_DETECTIONS)
            for f, k, v, s in zip(family_of.tolist(), label_of.tolist(), variant.tolist(), score.tolist()):
                segmentation = {"size": list(SIZE), "counts": families[f][v]["counts"].decode()}
                result = {"image_id": image, "category_id": k, "segmentation": segmentation}
                lines.append(results_lines([result | {"score": float(np.float32(s))}]))
        file.writelines(results_document(lines))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), folder / "records.parquet")
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, num_images + 1)]
    listed = [{"id": c.id, "name": c.name} for c in CATEGORIES]
    document = {"info": {}, "images": images, "annotations": annotations, "categories": listed}
    (folder / "instances.json").write_text(json.dumps(document))


def ours(folder: Path) -> float:
    with (folder / "results.json").open("rb") as file:
        results = read_results(file)
    return mask_ap(pyarrow.parquet.read_table(folder / "records.parquet"), results, CATEGORIES)["mask_ap"]


def hotcoco_of(folder: Path) -> float:
    import hotcoco

    coco = hotcoco.COCO(str(folder / "instances.json"))
    evaluation = hotcoco.COCOeval(coco, coco.load_res(str(folder / "results.json")), "segm")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]) * 100


VARIANTS: dict[str, Callable[[Path], float]] = {"ours": ours, "hotcoco": hotcoco_of}


def run_alone(variant: str, folder: Path) -> None:
    """Prints AP, CPU seconds and MB of one run of this process."""
    if variant == "hotcoco":
        import hotcoco  # noqa: F401  (imports are not counted)
    found, start = [0.0], time.process_time()
    grown = memory_growth_mb(lambda: found.__setitem__(0, VARIANTS[variant](folder)))
    print("\n" + json.dumps([found[0], time.process_time() - start, grown]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 images, once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        run_alone(options.alone[0], Path(options.alone[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_problem(Path(folder), NUM_IMAGES // 10 if options.quick else NUM_IMAGES)
        runs: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
        for _ in range(1 if options.quick else options.repeats):
            for name, found in runs.items():
                command = [sys.executable, __file__, "--alone", name, folder]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(printed.splitlines()[-1]))
    ap, seconds, memory = ({name: [run[i] for run in found] for name, found in runs.items()} for i in range(3))
    assert len({value for values in ap.values() for value in values}) == 1, ap
    for name in VARIANTS:
        print(f"{name:8} AP {ap[name][0]:.6f}  {spread(seconds[name])}  +{statistics.median(memory[name]):.0f} MB")
    report("COCO AP at val2017's size, memory", *(statistics.median(memory[name]) for name in VARIANTS), "MB")
    report("COCO AP at val2017's size, CPU", *(statistics.median(seconds[name]) for name in VARIANTS), "s")


if __name__ == "__main__":
    main()
