"""From a finished sweep to what its user looks at: result files, picture, report, table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from cast_ray.datasets.data_report import REPORT_FILE
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.picture import draw_samples
from cast_ray.report.results import read_results, summarise
from cast_ray.report.tables import print_report, write_report
from cast_ray.runtime.results import read_matches, read_result, row_name
from cast_ray.runtime.sweep import Sweep
from cast_ray.stages.table import Table


def publish(sweep: Sweep, table: Table, out: Path, console: Console) -> int:
    """Writes result.json of each row, the contact sheet and the report into `out` and prints the table.

    Returns:
        Exit code: 0 when every row is done, 1 when one failed or did not end.
    """
    context = sweep.context
    complete = True
    for row in sweep.rows:
        result = read_result(context, row)
        if result is None:  # the run was stopped before this row ended
            complete = False
            continue
        target = out / row_name(context.table, row) / "result.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1))
        for role, matches in read_matches(context, row):
            (target.parent / f"matches-{role}.npz").write_bytes(matches)
        complete &= result["status"] == "done"
    if (data_report := context.store.find_bytes(f"{context.runs_path}/{REPORT_FILE}")) is not None:
        (out / REPORT_FILE).write_bytes(data_report)
    draw_samples(sweep, out / CONTACT_SHEET)
    paths = write_report(out, table)
    print_report(summarise(read_results(out), table), console)
    console.print("Written: " + ", ".join(str(path) for path in paths.values()), soft_wrap=True, highlight=False)
    return 0 if complete else 1
