"""Mask AP against pycocotools: 500 images x 100 detections x 8 classes, from records and COCO results to the numbers.

    python benchmarks/evaluation.py [--quick] [--cpu]

Both start from the same ground truth and results in memory (reading JSON is not counted), compute COCO's twelve numbers
and must agree in each of them to the last bit before anything is timed. A second part draws bootstrap samples of the
images: pycocotools has to match and accumulate a repeated dataset, `DetectionMatches` counts what it has matched.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.contracts.records import RECORD_SCHEMA, Category
from cast_ray.evaluation.coco_ap import mask_ap, match_results

NUM_IMAGES, NUM_DETECTIONS, NUM_CLASSES, SIZE = 500, 100, 8, (256, 512)
CATEGORIES = tuple(Category(k, f"class {k}") for k in range(1, NUM_CLASSES + 1))
NAMES = ["mask_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NAMES += ["ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large"]


def make_problem(num_images: int = NUM_IMAGES) -> tuple[pa.Table, dict[str, Any], list[dict[str, Any]]]:
    """Records, the same as an instances JSON, and results: 4-16 objects an image, most detections near one of them."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, num_images + 1):
        objects = [_blob(rng) for _ in range(rng.integers(4, 17))]
        labels = rng.integers(1, NUM_CLASSES + 1, len(objects))
        instances = []
        for mask, label in zip(objects, labels.tolist()):
            rle = coco_mask.encode(mask)
            instances.append({"category_id": label, "rle": rle["counts"], "score": 1.0, "is_crowd": False})
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
                    "area": float(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                }
            )
        record = {"image_id": str(image), "uri": "", "height": SIZE[0], "width": SIZE[1], "instances": instances}
        rows.append(record)
        for _ in range(NUM_DETECTIONS):
            i = int(rng.integers(len(objects)))
            near = rng.random() < 0.6
            mask = np.roll(objects[i], rng.integers(-4, 5, 2), (0, 1)) if near else _blob(rng)
            label = int(labels[i]) if rng.random() < 0.9 else int(rng.integers(1, NUM_CLASSES + 1))
            counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
            segmentation = {"size": list(SIZE), "counts": counts}
            score = float(np.float32(rng.random()))
            results.append({"image_id": image, "category_id": label, "segmentation": segmentation, "score": score})
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, num_images + 1)]
    listed = [{"id": c.id, "name": c.name} for c in CATEGORIES]
    document = {"info": {}, "images": images, "annotations": annotations, "categories": listed}
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), document, results


def _blob(rng: np.random.Generator) -> np.ndarray:
    """An ellipse of 8 to 200 pixels across: uint8 [H, W]."""
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    (b, a), (cy, cx) = np.exp(rng.uniform(np.log(4), np.log(100), 2)), rng.uniform(8, (SIZE[0] - 8, SIZE[1] - 8))
    return np.asfortranarray(((y - cy) / b) ** 2 + ((x - cx) / a) ** 2 < 1).astype(np.uint8, order="F")


def rival(document: dict[str, Any], results: list[dict[str, Any]], clock: Callable[[], float]) -> tuple[float, dict]:
    """Seconds and numbers of pycocotools; it writes into its input, which is copied outside the time."""
    document, results = copy.deepcopy(document), copy.deepcopy(results)
    with contextlib.redirect_stdout(io.StringIO()):
        start = clock()
        coco = COCO()
        coco.dataset = document
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        seconds = clock() - start
    return seconds, dict(zip(NAMES, (float(s) * 100 for s in evaluation.stats)))


def ours(table: pa.Table, results: list[dict[str, Any]], clock: Callable[[], float]) -> tuple[float, dict]:
    start = clock()
    numbers = mask_ap(table, results, CATEGORIES)
    return clock() - start, {name: numbers[name] for name in NAMES}


def repeated(
    document: dict[str, Any], results: list[dict[str, Any]], counts: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The dataset of a bootstrap sample: each image followed by its copies."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    by_image: dict[int, tuple[list, list]] = {image["id"]: ([], []) for image in document["images"]}
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]][0].append(annotation)
    for result in results:
        by_image[result["image_id"]][1].append(result)
    for image, count in zip(document["images"], counts.tolist()):
        for _ in range(count):
            images.append(image | {"id": len(images) + 1})
            truth, found = by_image[image["id"]]
            for annotation in truth:
                annotations.append(annotation | {"id": len(annotations) + 1, "image_id": len(images)})
            copies += [result | {"image_id": len(images)} for result in found]
    return document | {"images": images, "annotations": annotations}, copies


def report(name: str, mine: list[float], theirs: list[float]) -> None:
    ours_s, theirs_s = statistics.median(mine), statistics.median(theirs)
    for who, seconds in (("ours", mine), ("pycocotools", theirs)):
        spread = f"{min(seconds):.4f}-{max(seconds):.4f}"
        print(f"{name:24} {who:12} {statistics.median(seconds):.4f} s (n={len(seconds)}, {spread})")
    facts = {"name": name, "ours": round(ours_s, 4), "theirs": round(theirs_s, 4)}
    print(json.dumps(facts | {"ratio": round(theirs_s / ours_s, 2), "unit": "s"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, for a look")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    repeats = 1 if options.quick else options.repeats
    table, document, results = make_problem()

    mine, theirs = [], []
    for _ in range(repeats):  # interleaved, so that a busy machine slows both alike
        seconds, numbers = ours(table, results, clock)
        mine.append(seconds)
        seconds, wanted = rival(document, results, clock)
        theirs.append(seconds)
        assert numbers == wanted, (numbers, wanted)
    print("equal to the last bit: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

    matches = match_results(table, results, CATEGORIES)
    rng = np.random.default_rng(1)
    mine_sample, theirs_sample = [], []
    for _ in range(repeats):
        counts = np.bincount(rng.integers(NUM_IMAGES, size=NUM_IMAGES), minlength=NUM_IMAGES)
        start = clock()
        ap = matches.mask_ap(counts)
        mine_sample.append(clock() - start)
        seconds, wanted = rival(*repeated(document, results, counts), clock)
        theirs_sample.append(seconds)
        assert ap == wanted["mask_ap"], (ap, wanted["mask_ap"])
    print(f"stored: {len(matches.to_bytes()) / 1024:.0f} KiB of matches, {len(matches.image)} detections")
    report("bootstrap sample", mine_sample, theirs_sample)
    report("evaluation", mine, theirs)


if __name__ == "__main__":
    main()
