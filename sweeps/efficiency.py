"""What teacher and students cost on this device: parameters, operations, latency, throughput, memory; the paper's.

python sweeps/ablate.py efficiency
python sweeps/ablate.py efficiency --rows dinov2-s eomt --set "data.image_px=[1024, 2048]"

No weights are needed: models are full-size, from their configs, with random weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from typing import cast

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import nn

from cast_ray.common.files import write_atomically
from cast_ray.console import Parser, output_file, positive
from cast_ray.engine.world import pick_device
from cast_ray.evaluation.efficiency import count_gmacs, count_parameters, measure_seconds, peak_memory
from cast_ray.models.autocast import autocast, fastest_precision, require_precision
from cast_ray.models.segmenter import build_segmenter, outline
from cast_ray.plan.ablation import load_table
from cast_ray.recipe import SCALES, Precision, Recipe, parse_overrides, preset_names
from cast_ray.teachers.outline import COUNTED, outline_teacher

TABLE, PRESET, SCALE = "student", "cityscapes", "full"
NUM_CLASSES = 8
"""Cityscapes' thing classes; more of them change the class head alone."""
TEACHER, STUDENT = "teacher", "dinov2-s"
"""Rows of ours that are the paper's `teacher` and `student`."""
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """One row: parameters in 10^6; of one image multiply-adds in 10^9 and memory in GiB; None: not measured."""

    row: str
    params_m: float
    gmacs: float
    latency_ms: float | None = None
    images_per_s: float | None = None
    peak_gib: float | None = None


def main(argv: list[str], console: Console) -> int:
    """The command `ablate.py efficiency`.

    Raises:
        ValueError: an unknown row, preset or key, or a device that is not there.
    """
    arguments = _parser().parse_args(argv)
    path = output_file(arguments.out) if arguments.out else None
    table = load_table(TABLE)
    overrides = parse_overrides(arguments.set)
    recipes = {
        row: table.row_recipe(row, arguments.preset, arguments.scale, overrides=overrides)
        for row in [r for r in arguments.rows or table.rows if r != TEACHER]
    }
    shared = table.row_recipe(next(iter(recipes), STUDENT), arguments.preset, arguments.scale, overrides=overrides)
    device = pick_device(arguments.device)
    costs = []
    with console.status("") as status:
        if not arguments.rows or TEACHER in arguments.rows:
            status.update(f"{TEACHER} on {device}")
            costs += _teacher_cost(shared, arguments, device)
        for row, recipe in recipes.items():
            status.update(f"{row} on {device}")
            costs.append(_cost(row, recipe, arguments, device))
    height, width = shared.data.image_px
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(_grid(costs, f"At {height} x {width} px" + ("" if arguments.count_only else f" on {where}")))
    console.print(_notes(arguments), highlight=False)
    if path is not None:
        content = {"device": where, "image_px": [height, width], "rows": list(map(asdict, costs))}
        write_atomically(path, json.dumps(content))
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return 0


def _cost(row: str, recipe: Recipe, arguments: argparse.Namespace, device: torch.device) -> Cost:
    bare = recipe.student.encoder.model_copy(update={"checkpoint": ""})
    config = recipe.student.model_copy(update={"encoder": bare})
    model = outline(config, NUM_CLASSES)
    model.anneal(1.0)
    counted = _counted(row, model, recipe)
    if arguments.count_only:
        return counted
    trained = build_segmenter(config, NUM_CLASSES, seed=0)
    trained.anneal(1.0)
    return _timed(counted, trained, recipe, arguments, device)


def _teacher_cost(recipe: Recipe, arguments: argparse.Namespace, device: torch.device) -> list[Cost]:
    """The recipe's teacher, on images of the same size as the students; [] where its kind cannot be counted."""
    if recipe.teacher.kind == "expert":
        return [_cost(TEACHER, recipe.model_copy(update={"student": recipe.teacher.segmenter}), arguments, device)]
    if recipe.teacher.kind not in COUNTED:
        return []
    counted = _counted(TEACHER, outline_teacher(recipe.teacher, NUM_CLASSES), recipe)
    if arguments.count_only:
        return [counted]
    teacher = outline_teacher(recipe.teacher, NUM_CLASSES, device=str(device))
    return [_timed(counted, teacher, recipe, arguments, device)]


def _counted(row: str, model: nn.Module, recipe: Recipe) -> Cost:
    images = torch.empty((1, 3, *recipe.data.image_px), dtype=torch.uint8, device="meta")
    return Cost(row, count_parameters(model) / 1e6, count_gmacs(model, images))


def _timed(
    counted: Cost, model: nn.Module, recipe: Recipe, arguments: argparse.Namespace, device: torch.device
) -> Cost:
    shape = (3, *recipe.data.image_px)
    measured = measure(model.eval().to(device), shape, arguments.batch, arguments.repeats, arguments.amp, device)
    return Cost(counted.row, counted.params_m, counted.gmacs, *measured)


def measure(
    model: nn.Module, shape: tuple[int, ...], batch: int, repeats: int, amp: str, device: torch.device
) -> tuple[float, float, float]:
    """(latency of one image in ms, images per second in batches, peak memory of one image in GiB, without weights)."""
    precision = fastest_precision(device) if amp == "auto" else cast(Precision, amp)
    require_precision(precision, device, "--amp")
    context = partial(autocast, precision, device)
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=device)
    latency = measure_seconds(lambda: model(images[:1]), device, repeats, context)
    seconds = measure_seconds(lambda: model(images), device, repeats, context) if batch > 1 else latency
    with context():
        num_bytes = peak_memory(lambda: model(images[:1]), device)
    return 1e3 * latency, batch / seconds, num_bytes / GIB


def _grid(costs: list[Cost], title: str) -> Grid:
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
        prog="ablate.py efficiency",
        description="Prints what the preset's teacher and each student of the table `student` cost on this device. "
        "Needs no weights or data.",
    )
    parser.add_argument("--preset", default=PRESET, help=f"one of {', '.join(preset_names())} (default: %(default)s)")
    parser.add_argument("--scale", default=SCALE, help=f"one of {', '.join(SCALES)} (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"only these rows, or {TEACHER}")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    parser.add_argument(
        "--batch", type=positive, default=4, help="images of the throughput column (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed passes (default: %(default)s)")
    parser.add_argument("--count-only", action="store_true", help="parameters and operations, nothing timed")
    parser.add_argument("--out", metavar="FILE.json", help="also write the numbers")
    return parser
