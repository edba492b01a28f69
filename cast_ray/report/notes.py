"""The words around a table: what was run, and what its numbers can and cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cast_ray.recipe.stages import KINDS_OF_AP
from cast_ray.report.content import Difference, Report, Result
from cast_ray.report.metrics import format_signed, label_of
from cast_ray.report.run_folder import UNREADABLE
from cast_ray.report.settings import first_of
from cast_ray.report.statistics import NUM_REPLICATES

NEAR_ZERO_AP = 1.0
MAX_NAMED = 8
AP_NAMES = {"coco": "COCO mask AP", "cityscapes": "Cityscapes' instance AP (not comparable with COCO's)"}
SEED_FIELDS = {"split_seed": "label split", "init_seed": "initial weights", "order_seed": "order of images"}
"""Recipe fields by which a part of the randomness stays the same for all seeds, and what they fix."""


def context_of(results: Sequence[Result]) -> dict[str, str]:
    """What was run, where and when, in words."""
    context: dict[str, str] = {}
    if commands := {r["command"] for r in results if r.get("command")}:
        context["command"] = "; ".join(sorted(commands))
    if starts := sorted(r["started"] for r in results if r.get("started")):
        context["started"] = starts[0]
    if machines := dict.fromkeys(hardware_text(r["hardware"]) for r in results if r.get("hardware")):
        context["machine"] = "; ".join(machines)
    if versions := {str(r["code_version"]) for r in results if r.get("code_version")}:
        context["code"] = ", ".join(sorted(versions))
    if recipe := next((r["recipe"] for r in results if r.get("recipe")), None):
        context["recipe"] = f"preset {recipe.get('preset')}, scale {recipe.get('scale')}"
        own = {**(recipe.get("data") or {}), **recipe}
        fixed = [f"{what} {own[key]}" for key, what in SEED_FIELDS.items() if own.get(key) is not None]
        if fixed:
            context["fixed seeds"] = ", ".join(fixed)
    if kinds := _kinds_of_ap(results):
        context["AP"] = " and ".join(AP_NAMES.get(kind, kind) for kind in sorted(kinds))
    if per_step := _images_per_step(results):
        context["images a step"] = per_step
    if with_data := [r for r in results if r.get("dataset")]:
        context["dataset"] = _dataset_text(with_data)
        context["label split"] = _splits_text([r["dataset"]["split"] for r in with_data if r["dataset"].get("split")])
        hashes = dict.fromkeys(str(r["dataset"]["content_hash"]) for r in with_data if r["dataset"].get("content_hash"))
        context["data hash"] = ", ".join(h[:16] for h in hashes)
    return {key: text for key, text in context.items() if text}


def _kinds_of_ap(results: Sequence[Result]) -> set[str]:
    return {str((r.get("recipe") or {}).get("evaluation", {}).get("metric")) for r in results} - {"None"}


def _images_per_step(results: Sequence[Result]) -> str:
    """How many images rows with and without D_u see in a step of 2b, and which of them stay equal."""
    recipes = [r["recipe"] for r in results if "distill" in (r.get("recipe") or {}).get("stages", {})]
    sizes = {(s["distill"]["batch_labelled"], s["distill"]["batch_unlabelled"]) for s in (r["stages"] for r in recipes)}
    rules = {r["stages"].get("images_per_step", "supervised") for r in recipes}
    if len(sizes) != 1 or len(rules) != 1:
        return ""
    ((labelled, unlabelled),) = sizes
    both = f"{labelled} labelled + {unlabelled} unlabelled, step 2b"
    if not unlabelled:
        return f"{labelled} labelled, step 2b"
    if rules == {"total"}:
        return f"{both}; rows without D_u take {labelled + unlabelled} labelled: all rows see as many images"
    return f"{both}; rows without D_u take {labelled} labelled: all rows see as many labelled images"


def hardware_text(hardware: dict[str, Any]) -> str:
    """`AMD EPYC, 2 CPUs, no GPU, 24 GB memory`."""
    gpu = hardware.get("gpu") or "no GPU"
    return (
        f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('num_cpus', '?')} CPUs, {gpu}, "
        f"{hardware.get('memory_gb', 0):.0f} GB memory"
    )


def _dataset_text(results: Sequence[Result]) -> str:
    """Counts of images; a count that rows differ in (label fractions) as a range, rows that use no D_u by name."""

    def values(key: str) -> list[int]:
        return sorted({r["dataset"][key] for r in results if r["dataset"].get(key) is not None})

    counts = []
    for key, what in (("num_labelled", "labelled"), ("num_unlabelled", "unlabelled"), ("num_val", "validation")):
        used = [v for v in values(key) if v] or values(key)
        if used:
            counts.append(f"{used[0]} {what}" if len(used) == 1 else f"{used[0]} to {used[-1]} {what}")
        without = dict.fromkeys(r["row"] for r in results if r["dataset"].get(key) == 0 and used != [0])
        if without:
            counts[-1] += f" (unused by {_named(list(without))})"
    classes = results[0]["dataset"].get("classes") or []
    skipped = max((r["dataset"] for r in results), key=lambda dataset: dataset.get("skipped") or 0)
    notes = dict.fromkeys(note for r in results for note in r["dataset"].get("notes") or [])
    text = "; ".join([", ".join(counts) + f" images, {len(classes)} classes", *(note.rstrip(".") for note in notes)])
    if not skipped.get("skipped"):
        return text
    return f"{text}; {skipped.get('skipped_statement') or str(skipped['skipped']) + ' unusable skipped'}"


def _splits_text(splits: Sequence[dict[str, Any]]) -> str:
    """How labelled images were chosen, each way once: `nested 10 %; 6 unlabelled images of the extra pool`."""
    text = _named(list(dict.fromkeys(_split_text(split) for split in splits)))
    extra = max((split["num_extra"] for split in splits), default=0)
    copies = max((split.get("num_copies", 0) for split in splits), default=0)
    text += f"; {extra} unlabelled images of the extra pool" if extra else ""
    return text + (f"; {copies} copies of labelled or validation images left out" if copies else "")


def _split_text(split: dict[str, Any]) -> str:
    text = f"{split['family']} {100 * split['fraction']:.3g} %"
    if split.get("num_empty"):
        text += f" less {split['num_empty']} images without objects"
    if "min_per_class" in split:
        text += f" with at least {split['min_per_class']} images of each class"
    if "label_list" in split:
        text += f" ({split['label_list']}, sha256 {split['label_list_sha256'][:12]})"
    return text


def notes_of(report: Report) -> list[str]:
    """What a reader must know before believing the table, in plain words."""
    notes = [*_data_notes(report), *_progress_notes(report), *_seed_notes(report), *verdicts(report)]
    done = [row for row in report.rows if row.seeds_done]
    if any(row.paper for row in done):
        where = f" ({report.paper_dataset})" if report.paper_dataset else ""
        note = f"The paper's values{where} are single runs on other data and models: compare order, not size."
        measured = _kinds_of_ap(report.results) - {report.paper_metric}
        if report.paper_metric and measured:
            kinds = " and ".join(KINDS_OF_AP.get(kind, kind) for kind in sorted(measured))
            note += f" They are {KINDS_OF_AP[report.paper_metric]}, the measured ones {kinds}: two different numbers."
        notes.append(note)
    if report.zero_shot:
        ap, ap50 = report.zero_shot.get("zero_shot/mask_ap"), report.zero_shot.get("zero_shot/ap50")
        parts = [f"AP {ap:.1f}" if ap is not None else "", f"AP50 {ap50:.1f}" if ap50 is not None else ""]
        notes.append(f"Teacher before adaptation (zero-shot): {', '.join(p for p in parts if p)}.")
    if report.steps.scratch:
        stored = sum(s.was_stored for s in report.stages)
        notes.append(
            f"Compute: {report.steps.unique:,.0f} training steps in {len(report.stages)} unique stages"
            f"{f' ({stored} found in the store)' if stored else ''}; each row alone from scratch: "
            f"{report.steps.scratch:,.0f} ({report.steps.saved_percent:.0f} % saved)."
        )
    for what, values in (
        ("datasets", {(r.get("dataset") or {}).get("content_hash") for r in report.results} - {None}),
        ("code versions", {r.get("code_version") for r in report.results} - {None}),
        ("kinds of AP", _kinds_of_ap(report.results)),
        ("scales", {(r.get("recipe") or {}).get("scale") for r in report.results} - {None}),
    ):
        if len(values) > 1:
            notes.append(f"WARNING: results of {len(values)} different {what} are mixed in this table.")
    return notes


def _data_notes(report: Report) -> list[str]:
    """Warnings for splits, and choices of labelled images, without one object."""
    datasets = [r["dataset"] for r in report.results if r.get("dataset")]
    notes = dict.fromkeys(f"WARNING: {text}" for dataset in datasets for text in dataset.get("warnings") or [])
    splits = [(r["row"], (r.get("dataset") or {}).get("split") or {}) for r in report.results]
    empty = dict.fromkeys(row for row, split in splits if split.get("num_with_objects") == 0)
    if empty and not notes:
        notes[f"WARNING: No object in the labelled images of {_named(list(empty))}: nothing was learnt from them."] = (
            None
        )
    return list(notes)


def _progress_notes(report: Report) -> list[str]:
    notes = []
    if report.num_pending:
        there = report.num_expected - report.num_pending
        notes.append(f"Not complete: {there} of {report.num_expected} results are there; numbers will change.")
    notes += [
        f"WARNING: {r['row']}, seed {r['seed']}: its result cannot be read and is left out. {r['error']}. The sweep's "
        "command writes it again."
        for r in report.results
        if r["status"] == UNREADABLE
    ]
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
    stages = [s for r in report.results for s in r.get("stages") or []]
    overflowed = {s["fingerprint"]: s for s in stages if s.get("skipped_steps")}
    notes += [
        f"{s['name']} ({fingerprint[:8]}): float16 overflowed in {s['skipped_steps']:,} of {s['steps']:,} steps, which "
        "were left out."
        for fingerprint, s in overflowed.items()
    ]
    bad = {s["name"]: s for r in report.results for s in r.get("stages") or [] if s.get("num_skipped")}
    notes += [
        f"WARNING: {name} left out {s['num_skipped']} of {s['num_skipped'] + s['num_images']} unlabelled images that "
        f"it could not read, first: {s['skipped'][0]}."
        for name, s in bad.items()
    ]
    return notes


def _seed_notes(report: Report) -> list[str]:
    done = [row for row in report.rows if row.seeds_done]
    most = max((len(row.seeds_done) for row in done), default=0)
    ways = {d.interval.resampled for d in report.differences if d.interval is not None}
    if most == 1 and len(done) > 1:
        note = "* 1 seed per row: differences are single runs and may be seed noise."
        if "images" in ways:
            note += f" Their 95 % intervals come from resampled images alone ({NUM_REPLICATES:,} draws)."
        return [note]
    if most == 1:
        return ["* 1 seed: a single run, whose seed noise is unknown."]
    if most < 1:
        return []
    singles = [row.name for row in done if len(row.seeds_done) == 1]
    how = {
        "images and seeds": f"bootstrap over images and seeds, {NUM_REPLICATES:,} draws",
        "seeds": "Student's t over seeds",
    }
    methods = " or ".join(text for way, text in how.items() if way in ways)
    note = f"Up to {most} seeds per row: mean ± standard deviation over seeds; differences are paired by seed"
    note += f", with 95 % intervals ({methods}), not corrected for the number of rows." if methods else "."
    return [note] + ([f"* a single run, whose seed noise is unknown: {_named(singles)}."] if singles else [])


def verdicts(report: Report) -> list[str]:
    """Which rows are above, below and not distinguishable from the baseline in the ranking metric."""
    differences = [d for d in report.differences if d.metric == report.metric and not d.same_artifact]
    label, baseline = label_of(report.metric), report.baseline

    def each(chosen: Iterable[Difference]) -> str:
        return _named([f"{d.row} ({format_signed(d.metric, d.mean)})" for d in chosen])

    seeds = [d for d in differences if d.interval is not None and d.interval.resampled != "images"]
    alone = [d for d in differences if d.interval is not None and d.interval.resampled == "images"]
    beyond = [d for d in alone if d.interval is not None and (d.interval.low > 0 or d.interval.high < 0)]
    notes = []
    if above := [d for d in seeds if d.is_clear and d.mean > 0]:
        notes.append(f"Above {baseline} in {label}: {each(above)}.")
    if below := [d for d in seeds if d.is_clear and d.mean < 0]:
        notes.append(f"Below {baseline} in {label}: {each(below)}.")
    if noise := [d for d in seeds if not d.is_clear]:
        notes.append(f"Not distinguishable from noise: {each(noise)} against {baseline} in {label}.")
    if beyond:
        notes.append(f"Beyond the noise of the images, in 1 seed: {each(beyond)} against {baseline} in {label}.")
    if inside := [d for d in alone if d not in beyond]:
        notes.append(f"Not distinguishable from the noise of the images: {each(inside)} against {baseline} in {label}.")
    return notes


def failure_text(report: Report) -> list[str]:
    """One line a failed result: row, seed, reason and where its log is."""
    return [f"{f.row}, seed {f.seed}: {f.reason}" + (f" (log: {f.log})" if f.log else "") for f in report.failures]


def status_text(result: Result) -> str:
    """`done`, `FAILED` or `UNREADABLE`."""
    return {"done": "done", UNREADABLE: "UNREADABLE"}.get(result["status"], "FAILED")


def _named(names: Sequence[str]) -> str:
    return first_of(names, MAX_NAMED)
