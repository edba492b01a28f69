"""`cast-ray inspect` looks into a dataset before anything is trained on it.

cast-ray inspect DIR
cast-ray inspect DIR --format coco --set data.annotations=my.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cast_ray.cli.dataset_folder import FORMATS, recipe_of_folder
from cast_ray.cli.options import EXIT_FAILED, Parser, add_set_option, exit_code, output_folder, plain_console, positive
from cast_ray.common.files import check_replaceable, write_atomically
from cast_ray.contracts.records import ClassMap, DatasetSplits, class_names, mask_areas
from cast_ray.data.reading.data_report import REPORT_FILE, check_report, is_report, print_warnings
from cast_ray.data.reading.images import read_image
from cast_ray.data.reading.inspection import SplitFacts, choose_samples, facts_of
from cast_ray.data.reading.progress import track
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

MAX_SHOWN = 12
SAMPLES = "samples.png"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: inspect(arguments, plain_console()))


def inspect(arguments: argparse.Namespace, console: Console) -> int:
    """Reads a dataset, prints what is in it and writes a contact sheet and `data_report.json`.

    Returns:
        0, or EXIT_FAILED for a dataset that a run would refuse because too many of its files are bad.

    Raises:
        ValueError: the folder is no dataset.
    """
    recipe_data = recipe_of_folder(arguments.root, arguments.format, arguments.set).data
    root, kind = recipe_data.root, recipe_data.format
    out = output_folder(arguments.out or str(Path("inspect") / (Path(root.rstrip("/")).name or kind)))
    what, expected = "a report of `cast-ray inspect`", "another --out, or one without these files"
    check_replaceable(out, [REPORT_FILE, SAMPLES], lambda: is_report(out / REPORT_FILE), what, expected)
    config = recipe_data.model_copy(update={"max_bad_fraction": 1.0})
    with track(console, "reading images") as progress:
        dataset, report = load(config, progress)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / REPORT_FILE, json.dumps(report, indent=1))
    sheet = _draw(dataset, arguments.images, out / SAMPLES)
    facts = facts_of(dataset)
    heading = Text.assemble((root, "bold"), f": {kind}, {len(dataset.categories)} classes")
    console.print(heading, highlight=False, soft_wrap=True)
    console.print(_splits_table(facts))
    console.print(_classes_table(facts, dataset))
    is_refused = _print_skipped(report, recipe_data, console)
    for note in report["notes"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print_warnings(report["warnings"], console)
    console.print(f"Written: {sheet}, {out / REPORT_FILE}", highlight=False, soft_wrap=True)
    return EXIT_FAILED if is_refused else 0


def _splits_table(facts: list[SplitFacts]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    columns = ("images", "without objects", "objects", "ignore regions", "small", "medium", "large")
    for column in (*columns, "size (pixels)"):
        table.add_column(column, justify="right")
    for split in facts:
        counts = (split.num_images, split.num_empty, split.num_objects, split.num_crowds, *split.areas)
        table.add_row(split.name, *(f"{count:,}" for count in counts), _sizes(split))
    return table


def _sizes(split: SplitFacts) -> str:
    """The most frequent size of a split's images and how many others there are; empty without an image."""
    if not split.sizes:
        return ""
    (height, width), most = next(iter(split.sizes.items()))
    others = f" and {len(split.sizes) - 1} others" if len(split.sizes) > 1 else ""
    share = f" ({100 * most / split.num_images:.0f} %)" if others else ""
    return f"{width} x {height}{share}{others}"


def _classes_table(facts: list[SplitFacts], dataset: DatasetSplits) -> Table:
    labelled = [split for split in facts if split.name != "extra"]
    table = Table(box=None, pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("class")
    for split in labelled:
        table.add_column(f"{split.name}: objects", justify="right")
        table.add_column("images", justify="right")
    for label, (category, name) in enumerate(zip(dataset.categories, class_names(dataset.categories))):
        counts = [str(n) for s in labelled for n in (s.objects_by_class[label], s.images_by_class[label])]
        table.add_row(str(category.id), name, *counts)
    return table


def _print_skipped(report: dict[str, Any], config: DataConfig, console: Console) -> bool:
    """Prints what was skipped and returns whether a run would refuse the dataset for it."""
    console.print(report["statement"], highlight=False)
    for entry in report["skipped"][:MAX_SHOWN]:
        text = f"  {entry['split']} {entry['kind']} {entry['id']} ({entry['file']}): {entry['reason']}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(report["skipped"]) > MAX_SHOWN:
        console.print(f"  and {len(report['skipped']) - MAX_SHOWN} more in {REPORT_FILE}", highlight=False)
    try:
        check_report(report, config.max_bad_fraction)
    except ValueError as error:
        console.print(f"A run would refuse it: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return True
    return False


def _draw(dataset: DatasetSplits, num_images: int, path: Path) -> Path:
    from cast_ray.report.overlays import contact_sheet  # loads SciPy, which --help does without

    classes = ClassMap(dataset.categories)
    records = choose_samples(dataset.train, num_images)
    images = [read_image(r["uri"], (r["height"], r["width"])) for r in records]
    columns = []
    for title, is_crowd in (("objects", False), ("ignore regions", True)):
        drawn = [[i for i in _largest_first(r) if i["category_id"] in classes] for r in records]
        kept = [[i for i in each if i["is_crowd"] == is_crowd] for each in drawn]
        chosen = [[{"rle": i["rle"], "label": classes.label(i["category_id"])} for i in each] for each in kept]
        if not is_crowd or any(chosen):
            columns.append((title, chosen))
    return contact_sheet(images, columns, classes.names(), path)


def _largest_first(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Sorts the instances of a record by area, the largest first, so that small objects are drawn over large ones."""
    size = [record["height"], record["width"]]
    areas = mask_areas([{"size": size, "counts": i["rle"]} for i in record["instances"]])
    return [record["instances"][i] for i in np.argsort(-areas, kind="stable")]


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray inspect",
        description="Reads every image and annotation of a dataset as a run would, and shows what is there: counts per "
        "class and split, sizes, bad files, and a picture with masks drawn.",
    )
    parser.add_argument("root", metavar="DIR", help="folder or URI of the dataset, as its owners distribute it")
    parser.add_argument(
        "--format", help=f"{FORMATS}, or MODULE:FUNCTION (default: recognised by its files and folders)"
    )
    add_set_option(parser, "a data key of the recipe")
    parser.add_argument("--images", type=positive, default=6, help="images on the contact sheet (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder for samples.png and data_report.json (default: inspect/NAME)"
    )
    return parser
