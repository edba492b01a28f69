"""The words around a table: what was run, and what its numbers can and cannot show."""

from __future__ import annotations

from collections.abc import Sequence

from cast_ray.report.content import Report, Result

NEAR_ZERO_AP = 1.0
DATASET_COUNTS = {"num_labelled": "labelled", "num_unlabelled": "unlabelled", "num_val": "validation"}


def context_of(results: Sequence[Result]) -> dict[str, str]:
    """What was run, where and when, in words."""
    context: dict[str, str] = {}
    first = results[0]
    if commands := {r["command"] for r in results if r.get("command")}:
        context["command"] = "; ".join(sorted(commands))
    if starts := sorted(r["started"] for r in results if r.get("started")):
        context["started"] = starts[0]
    if hardware := first.get("hardware"):
        gpu = hardware.get("gpu") or "no GPU"
        context["machine"] = (
            f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('num_cpus', '?')} CPUs, {gpu}, "
            f"{hardware.get('memory_gb', 0):.0f} GB memory"
        )
    if versions := {str(r["code_version"]) for r in results if r.get("code_version")}:
        context["code"] = ", ".join(sorted(versions))
    if recipe := first.get("recipe"):
        context["recipe"] = f"preset {recipe.get('preset')}, scale {recipe.get('scale')}"
    if data := first.get("dataset"):
        context["dataset"] = (
            ", ".join(f"{data[key]} {what}" for key, what in DATASET_COUNTS.items() if data.get(key) is not None)
            + f" images, {len(data['classes'])} classes"
            + (f", {data['skipped']} unusable skipped" if data.get("skipped") else "")
        )
    return context


def notes_of(report: Report) -> list[str]:
    """What a reader must know before believing the table, in plain words."""
    notes = []
    done = [row for row in report.rows if row.seeds_done]
    aps = [cell.mean for row in done for name, cell in row.cells.items() if name.endswith("/mask_ap")]
    if aps and max(aps) < NEAR_ZERO_AP:
        steps = max(sum(s.get("steps") or 0 for s in r.get("stages") or []) for r in report.results)
        notes.append(
            f"AP near 0: {steps:,} training steps are too few to learn; this run only proves that the path works."
        )
    empty = {s["name"] for r in report.results for s in r.get("stages") or [] if s.get("num_pseudo_labels", 1) == 0}
    if empty:
        notes.append(
            f"WARNING: no pseudo-label at all from {', '.join(sorted(empty))}: nothing reached pseudo.score_threshold; "
            "rows that learn from pseudo-labels learnt nothing from them."
        )
    most = max((len(row.seeds_done) for row in done), default=0)
    if most == 1 and len(done) > 1:
        notes.append("1 seed per row: differences below are single runs and may be seed noise.")
    elif most == 1:
        notes.append("1 seed: a single run, whose seed noise is unknown.")
    elif most > 1:
        notes.append(
            f"Up to {most} seeds per row: mean ± standard deviation over seeds; differences are paired by seed."
        )
    if any(row.paper for row in done):
        where = f" ({report.paper_dataset})" if report.paper_dataset else ""
        notes.append(f"The paper's values{where} are single runs on other data and models: compare order, not size.")
    if report.zero_shot:
        ap, ap50 = report.zero_shot.get("zero_shot/mask_ap"), report.zero_shot.get("zero_shot/ap50")
        parts = [f"AP {ap:.1f}" if ap is not None else "", f"AP50 {ap50:.1f}" if ap50 is not None else ""]
        notes.append(f"Teacher before adaptation (zero-shot): {', '.join(p for p in parts if p)}.")
    if report.steps_from_scratch:
        stored = sum(s.was_stored for s in report.stages)
        saved = 100 * (1 - report.steps_unique / report.steps_from_scratch)
        notes.append(
            f"Compute: {report.steps_unique:,} training steps in {len(report.stages)} unique stages"
            f"{f' ({stored} found in the store)' if stored else ''}; each row alone from scratch: "
            f"{report.steps_from_scratch:,} ({saved:.0f} % saved)."
        )
    for what, values in (
        ("datasets", {(r.get("dataset") or {}).get("content_hash") for r in report.results} - {None}),
        ("code versions", {r.get("code_version") for r in report.results} - {None}),
        ("scales", {(r.get("recipe") or {}).get("scale") for r in report.results} - {None}),
    ):
        if len(values) > 1:
            notes.append(f"WARNING: results of {len(values)} different {what} are mixed in this table.")
    return notes
