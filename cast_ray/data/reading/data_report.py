"""data_report.json: what a dataset held, what of it was skipped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cast_ray.data.reading.index import HeldOut, Skipped, describe
from cast_ray.recipe import DataConfig

REPORT_FILE = "data_report.json"
SPLIT_NAMES = {"train": "training", "val": "validation", "source": "source"}
LARGE_SHARE = 0.25
"""Share of a file's images above which images without a mask are taken for images that nobody has annotated."""


class Contents(NamedTuple):
    """What the usable images of a split hold.

    num_objects, num_ignored: annotations that are objects, and those that are ignore regions; num_unmasked: images that
    an annotation file lists without any usable annotation (0 of a format with a label map for each image, which says
    that nothing is there).
    """

    num_objects: int
    num_ignored: int
    num_unmasked: int = 0


def data_report(
    config: DataConfig,
    num_images: Mapping[str, int],
    num_annotations: Mapping[str, int],
    skipped: Sequence[Skipped],
    sources: Mapping[str, str],
    contents: Mapping[str, Contents] | None = None,
    all_ignored_hint: str = "",
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """What `data_report.json` says.

    Args:
        config: settings with which the dataset was read.
        num_images, num_annotations: split -> their number, with the skipped ones.
        skipped: each with split, kind, id, file and reason.
        sources: split -> the file or folder of its annotations.
        contents: split -> what its images hold, of the splits that were read and whose images have annotations.
        all_ignored_hint, held_out: see DatasetIndex.

    Returns:
        format, root, verify; splits: split -> source, images, images_skipped, annotations, annotations_skipped and,
        where `contents` knows them, objects and ignore_regions; statement: the sums in words; warnings: a sentence for
        each split that was read and holds no object; skipped.
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
    sums = {name: sum(split[name] for split in counts.values()) for name in next(iter(counts.values()))}
    splits: dict[str, dict[str, Any]] = {split: {"source": sources.get(split, "")} | counts[split] for split in counts}
    warnings = []
    for split, held in (contents or {}).items():
        splits[split] |= {"objects": held.num_objects, "ignore_regions": held.num_ignored}
        if not held.num_objects:
            bad = [s for s in skipped if s["split"] == split and s["kind"] == "annotation"]
            total = num_annotations[split]
            if split == "val" and held_out is not None:
                bad, total = list(held_out.skipped), held_out.num_annotations
            warnings.append(_no_object(split, splits[split], total, bad, all_ignored_hint))
    warnings += _images_without_masks(splits, contents or {}, is_held_out=held_out is not None)
    statement = (
        f"{sums['images_skipped']:,} of {sums['images']:,} images and {sums['annotations_skipped']:,} of "
        f"{sums['annotations']:,} annotations skipped"
    )
    facts = {"format": config.format, "root": config.root, "verify": config.verify}
    return facts | {"splits": splits, "statement": statement, "warnings": warnings, "skipped": list(skipped)}


def is_report(path: Path) -> bool:
    """Whether a file is a data report, as `data_report` makes it.

    Raises:
        OSError, ValueError: it cannot be read, or is not JSON.
    """
    report = json.loads(path.read_bytes())
    return isinstance(report, dict) and {"verify", "splits", "statement", "skipped"} <= report.keys()


def _no_object(
    split: str, facts: Mapping[str, Any], total: int, skipped: Sequence[Skipped], all_ignored_hint: str
) -> str:
    """Says that a split holds no object, and the likely cause.

    Args:
        facts: entry of the split in the report.
        total: number of its annotations.
        skipped: those of them that were skipped.
    """
    source = f" ({facts['source']})" if facts["source"] else ""
    held_out = "" if source else "they were held out of the training images (data.val_fraction), and "
    ignored = facts["ignore_regions"]
    if ignored:
        cause = f"all {ignored:,} usable annotations are ignore regions, which are neither objects nor background. "
        cause += all_ignored_hint
        if skipped:
            cause += f" {len(skipped):,} more annotations were skipped: {describe(skipped, 1)}."
    elif skipped:
        cause = f"{held_out}{len(skipped):,} of {total:,} annotations were skipped: {describe(skipped, 1)}."
    elif total:
        cause = f"{held_out}all {total:,} annotations belong to images that were skipped."
    else:
        cause = f"{held_out}there is no annotation."
    effect = "Their AP cannot be measured." if split == "val" else "Nothing can be learnt from them."
    kind = SPLIT_NAMES.get(split, split)
    return f"No object in the {facts['images']:,} {kind} images{source}: {cause.strip()} {effect}"


def _images_without_masks(
    splits: Mapping[str, Mapping[str, Any]], contents: Mapping[str, Contents], is_held_out: bool
) -> list[str]:
    """Says of each annotation file, if its images have masks, that a large share of them has none.

    Args:
        splits: entries of the splits in the report.
        is_held_out: the validation images are from the annotation file of the training images.
    """
    warnings = []
    for split, held in contents.items():
        together = ["train", "val"] if is_held_out and split == "train" and "val" in contents else [split]
        num_images = sum(splits[name]["images"] - splits[name]["images_skipped"] for name in together)
        num_unmasked = sum(contents[name].num_unmasked for name in together)
        is_told = not held.num_objects or (is_held_out and split == "val")
        if is_told or num_unmasked <= LARGE_SHARE * num_images:
            continue
        kind = " and ".join(SPLIT_NAMES.get(name, name) for name in together)
        source = f" ({splits[split]['source']})" if splits[split]["source"] else ""
        warnings.append(
            f"{num_unmasked:,} of {num_images:,} {kind} images{source} have no mask: they count as images without "
            "objects, not as unlabelled ones. Put unlabelled images into a folder without annotations and name it by "
            "data.extra_image_dir, with data.unlabelled_pool=extra."
        )
    return warnings


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Prints what a user must not overlook, a line for each warning."""
    for warning in warnings:
        text = f"WARNING: {warning}"
        console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def check_report(report: Mapping[str, Any], max_bad_fraction: float) -> None:
    """Refuses a dataset of which too much was skipped.

    Raises:
        ValueError: more than `max_bad_fraction` of a split's images or annotations are unusable, or all of its images;
            the message gives the counts and the first reasons. Or the report holds a refusal of the format's own.
    """
    for refusal in report.get("refusals", []):
        raise ValueError(refusal)
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
            bad = [s for s in report["skipped"] if s["split"] == split and s["kind"] == "image"]
            reasons = f": {describe(bad)}" if bad else ""
            raise ValueError(f"{where}: no usable image of {counts['images']}{reasons}")
