"""data_report.json: what a dataset held, what of it was skipped and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cast_ray.datasets.index import Skipped, describe
from cast_ray.recipe import DataConfig

REPORT_FILE = "data_report.json"


def data_report(
    config: DataConfig,
    num_images: Mapping[str, int],
    num_annotations: Mapping[str, int],
    skipped: Sequence[Skipped],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    """What `data_report.json` says.

    Args:
        config: as the dataset was read.
        num_images, num_annotations: by split, the skipped ones included.
        skipped: each with split, kind, id, file and reason.
        sources: split -> the file or folder of its annotations.

    Returns:
        format, root, verify; splits: split -> source, images, images_skipped, annotations, annotations_skipped;
        statement: the sums in words; skipped.
    """
    counts = {
        split: {
            "images": num_images[split],
            "images_skipped": sum(s["split"] == split and s["kind"] == "image" for s in skipped),
            "annotations": num_annotations[split],
            "annotations_skipped": sum(s["split"] == split and s["kind"] == "annotation" for s in skipped),
        }
        for split in num_images
    }
    sums = {name: sum(split[name] for split in counts.values()) for name in counts["train"]}
    splits = {split: {"source": sources.get(split, "")} | counts[split] for split in counts}
    statement = (
        f"{sums['images_skipped']:,} of {sums['images']:,} images and {sums['annotations_skipped']:,} of "
        f"{sums['annotations']:,} annotations skipped"
    )
    facts = {"format": config.format, "root": config.root, "verify": config.verify}
    return facts | {"splits": splits, "statement": statement, "skipped": list(skipped)}


def check_report(report: Mapping[str, Any], max_bad_fraction: float) -> None:
    """Refuses a dataset of which too much was skipped.

    Raises:
        ValueError: more than `max_bad_fraction` of a split's images or annotations are unusable, or all of its images;
            the message gives the counts and the first reasons.
    """
    for split, counts in report["splits"].items():
        where = f"{report['root']} ({split}{': ' if counts['source'] else ''}{counts['source']})"
        for kind in ("image", "annotation"):
            chosen = [s for s in report["skipped"] if s["split"] == split and s["kind"] == kind]
            total = counts[f"{kind}s"]
            if len(chosen) > max_bad_fraction * total:
                raise ValueError(
                    f"{where}: {len(chosen)} of {total} {kind}s skipped, above "
                    f"data.max_bad_fraction={max_bad_fraction}: {describe(chosen)}"
                )
        if counts["images_skipped"] == counts["images"]:
            raise ValueError(f"{where}: no usable image of {counts['images']}")
