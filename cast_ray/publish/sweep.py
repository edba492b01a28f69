"""From a sweep to what its user looks at: result files, pictures, report, table on the terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from cast_ray.common.files import write_atomically
from cast_ray.data.reading.data_report import REPORT_FILE
from cast_ray.plan.ablation import Table
from cast_ray.plan.graph import RowPlan
from cast_ray.plan.prices import Prices
from cast_ray.publish.drawings import draw_samples
from cast_ray.publish.label_audit import worst_cases
from cast_ray.publish.samples import row_samples
from cast_ray.recipe import Recipe
from cast_ray.report.label_audit import WORST_SHEET
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.run_folder import RESULT, matches_file, recipe_digest, write_plan
from cast_ray.report.samples import SAMPLES
from cast_ray.report.write import show, write_report
from cast_ray.runtime.sweep.row_results import SweepContext, read_matches, read_result, row_name
from cast_ray.runtime.sweep.run import Sweep


def announce(
    out: Path,
    table: Table,
    recipes: Mapping[tuple[str, int], Recipe],
    settings: Mapping[str, Any],
    results_uri: str,
    console: Console,
    effect: float | None = None,
    prices: Prices | None = None,
    at: Callable[[Path], str] = str,
) -> None:
    """Notes in the run folder what a sweep is about to run, so that its report can be watched from the start.

    Args:
        recipes: (row, seed) -> recipe.
        settings: what the rows have in common, by which a later command knows that this folder is its own.
        results_uri: folder of the store that each row's result appears in when it ends.
        effect: smallest effect of interest that the report is to use; None: that of an earlier command, else its own.
        prices: of a device-hour, for the report; None: none were named.
        at: what a user knows a file by, see `ResultsFolder.at`.
    """
    expected = [(table.name, row, seed) for row, seed in recipes]
    digests = [recipe_digest(json.loads(recipe.model_dump_json())) for recipe in recipes.values()]
    effects = {} if effect is None else {table.name: effect}
    write_plan(
        out,
        [table],
        expected,
        results_uri,
        digests,
        settings={table.name: settings},
        effects=effects,
        prices=prices,
    )
    console.print(f"  report   {at(out / 'report.html')}", soft_wrap=True, highlight=False)
    console.print(f"    live: cast-ray report {at(out)} --watch", soft_wrap=True, highlight=False)


def publish(sweep: Sweep, table: Table, out: Path, console: Console, at: Callable[[Path], str] = str) -> int:
    """Writes each row's result and pictures and the report into `out` and prints the table.

    Args:
        at: what a user knows a file by, see `ResultsFolder.at`.

    Returns:
        Exit code: 0 when every row is done, 1 when one failed or did not end.
    """
    expected = [(sweep.context.table, row.row, row.seed) for row in sweep.rows]
    write_plan(out, [table], expected, sweep.context.store.uri(sweep.context.runs_path))
    is_drawn: set[str] = set()
    pairs = list(zip(sweep.contexts, sweep.rows))
    for context, row in pairs:
        # a run that was stopped before this row ended has no result of it
        if publish_row(context, row, out, console, with_samples=row.row not in is_drawn):
            is_drawn.add(row.row)
    if (data_report := sweep.context.store.find_bytes(f"{sweep.context.runs_path}/{REPORT_FILE}")) is not None:
        write_atomically(out / REPORT_FILE, data_report)
    with _or_without(CONTACT_SHEET, console):
        draw_samples(sweep, out / CONTACT_SHEET)
    with _or_without(WORST_SHEET, console):
        any(worst_cases(context, row, out / WORST_SHEET) for context, row in reversed(pairs))
    show(write_report(out, tell=console.print), console, at)
    # Of this sweep's rows alone: the report also shows what earlier ones left in the folder.
    results = [read_result(context, row) for context, row in pairs]
    return 0 if all(result is not None and result.is_done for result in results) else 1


@contextlib.contextmanager
def _or_without(picture: str, console: Console) -> Iterator[None]:
    """Leaves a picture out of the report, with a message, if it cannot be drawn, for example because an image is
    gone."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        console.print(f"{picture} is left out: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def publish_row(context: SweepContext, row: RowPlan, out: Path, console: Console, with_samples: bool = True) -> bool:
    """Copies a row's result and per-image data into `out`, draws its worst and best images; False unless it is done."""
    result = read_result(context, row)
    if result is None:
        return False
    folder = out / row_name(context.table, row)
    write_atomically(folder / RESULT, result.to_json())
    if not result.is_done:
        return False
    for role, matches in read_matches(context, row):
        write_atomically(folder / matches_file(role), matches)
    if with_samples:
        with _or_without(f"{row.row}: {SAMPLES}", console):
            if (samples := row_samples(context, row)) is not None:
                write_atomically(folder / SAMPLES, samples)
    return True
