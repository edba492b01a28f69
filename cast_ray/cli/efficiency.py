"""`cast-ray efficiency` measures what teacher and students cost on this device, beside the paper's values.

cast-ray efficiency
cast-ray efficiency --rows dinov2-s eomt --set "data.image_px=[1024, 2048]"

No weights are needed: models are full-size, from their configs, with random weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid

from cast_ray.cli.options import (
    Parser,
    add_device_options,
    add_recipe_options,
    exit_code,
    output_file,
    plain_console,
    positive,
)
from cast_ray.common.files import write_atomically
from cast_ray.plan.ablation import load_table
from cast_ray.recipe import parse_overrides

if TYPE_CHECKING:
    from cast_ray.inference.model_cost import Cost

TABLE, PRESET, SCALE = "student", "cityscapes", "full"
TEACHER, STUDENT = "teacher", "dinov2-s"
"""Rows of ours that are the paper's `teacher` and `student`."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _measure(arguments, plain_console()))


def _measure(arguments: argparse.Namespace, console: Console) -> int:
    """Prints a line for each model, then what the numbers mean.

    Raises:
        ValueError: an unknown row, preset or key, or a device that is not there.
    """
    path = output_file(arguments.out) if arguments.out else None
    table = load_table(TABLE)
    overrides = parse_overrides(arguments.set)
    recipes = {
        row: table.row_recipe(row, arguments.preset, arguments.scale, overrides=overrides)
        for row in [r for r in arguments.rows or table.rows if r != TEACHER]
    }
    shared = table.row_recipe(next(iter(recipes), STUDENT), arguments.preset, arguments.scale, overrides=overrides)

    import torch  # once the arguments are sound

    from cast_ray.engine.world import pick_device
    from cast_ray.inference.model_cost import Timing, student_cost, teacher_cost

    device = pick_device(arguments.device)
    timing = None if arguments.count_only else Timing(device, arguments.amp, arguments.batch, arguments.repeats)
    costs = []
    with console.status("") as status:
        if not arguments.rows or TEACHER in arguments.rows:
            status.update(f"{TEACHER} on {device}")
            costs += [cost for cost in [teacher_cost(TEACHER, shared, timing)] if cost is not None]
        for row, recipe in recipes.items():
            status.update(f"{row} on {device}")
            costs.append(student_cost(row, recipe, timing))
    height, width = shared.data.image_px
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(_grid(costs, f"At {height} x {width} px" + ("" if arguments.count_only else f" on {where}")))
    console.print(_notes(arguments), highlight=False)
    if path is not None:
        content = {"device": where, "image_px": [height, width], "rows": list(map(asdict, costs))}
        write_atomically(path, json.dumps(content))
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return 0


def _grid(costs: list[Cost], title: str) -> Grid:
    from cast_ray.inference.model_cost import Cost

    grid = Grid(title=title, title_justify="left")
    for column in ("model", "M params", "GMACs", "ms/image", "images/s", "GiB/image"):
        grid.add_column(column, justify="left" if column == "model" else "right")
    for cost in costs:
        cells = (cost.params_m, cost.gmacs, cost.latency_ms, cost.images_per_s, cost.peak_gib)
        grid.add_row(cost.row, *("-" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in cells))
    if ratio := _ratio(costs):
        grid.add_row(*ratio, style="bold")
    published = json.loads((resources.files("cast_ray") / "paper" / "tables.json").read_text())["efficiency"]
    theirs = [Cost(f"paper: {name}", *numbers) for name, *numbers in published["rows"]]
    for cost in theirs:
        numbers = (cost.params_m, cost.gmacs, cost.latency_ms, cost.images_per_s)
        grid.add_row(cost.row, *map(str, numbers), "-", style="dim")
    grid.add_row(*_ratio(theirs, "paper: "), style="dim")
    return grid


def _ratio(costs: list[Cost], prefix: str = "") -> list[str]:
    """Teacher : student in each column (images/s: student : teacher); [] without both."""
    by_row = {cost.row: cost for cost in costs}
    teacher = by_row.get(prefix + TEACHER)
    student = by_row.get(prefix + ("student" if prefix else STUDENT))
    if teacher is None or student is None:
        return []
    pairs = [
        (teacher.params_m, student.params_m),
        (teacher.gmacs, student.gmacs),
        (teacher.latency_ms, student.latency_ms),
        (student.images_per_s, teacher.images_per_s),
        (teacher.peak_gib, student.peak_gib),
    ]
    return [f"{prefix}teacher : student", *(f"{a / b:.1f}x" if a and b else "-" for a, b in pairs)]


def _notes(arguments: argparse.Namespace) -> str:
    lines = [
        "GMACs: multiply-adds. The paper gives GFLOPs without the image size or the device of its table.",
        "teacher: published sizes of its checkpoints, one prompt and 20 boxes an image; the detector's side is 800 to",
        "1333 px, the segmenter's 1024, whatever the image's.",
        "dinov2-s is the paper's student: encoder 22.1 M, reassemble stage 6.2 M, DPT fusion 10.5 M, head 14.5 M. The",
        "paper's 52 M has 22 M for its decoder; it does not give the widths. released is that of the authors' code.",
    ]
    if not arguments.count_only:
        lines.append(
            f"Medians of {arguments.repeats} forward passes, amp {arguments.amp}; images/s in batches of "
            f"{arguments.batch}; memory without weights."
        )
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray efficiency",
        description="Prints what the preset's teacher and each student of the table `student` cost on this device. "
        "Needs no weights or data.",
    )
    add_recipe_options(parser, preset=PRESET, scale=SCALE)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"only these rows, or {TEACHER}")
    add_device_options(parser, amp="the fastest of the device")
    parser.add_argument(
        "--batch", type=positive, default=4, help="images of a batch when images/s are measured (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed passes (default: %(default)s)")
    parser.add_argument(
        "--count-only", action="store_true", help="count parameters and operations without timing anything"
    )
    parser.add_argument("--out", metavar="FILE.json", help="also write the numbers to this file")
    return parser
