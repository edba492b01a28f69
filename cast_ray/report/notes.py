"""The words around a table: what was run, and what its numbers can and cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cast_ray.common.text import first_of
from cast_ray.contracts.compute_node import nodes_text
from cast_ray.contracts.row_result import DatasetFacts, Hardware, RowResult, SplitFacts
from cast_ray.recipe.licence_chain import MAX_CHAINS, LicenceChain, by_rows, chain_of_plain_recipe, warnings_of
from cast_ray.recipe.stages import KINDS_OF_AP
from cast_ray.report.content import Difference, Report, Result
from cast_ray.report.decision_table import decision_notes
from cast_ray.report.metrics import format_signed, label_of
from cast_ray.report.statistics import NUM_REPLICATES

NEAR_ZERO_AP = 1.0
MAX_NAMED = 8
ROUNDING_AP, ROUNDING_DIFFERENCE_AP = 2.4, 1.2
"""How far rounding alone has moved an AP, and a difference of two rows: the same seed and command on two machines of
one kind (docs/measuring.md)."""
AP_NAMES = {"coco": "COCO mask AP", "cityscapes": "Cityscapes' instance AP (not comparable with COCO's)"}
SEED_FIELDS = {"data.split_seed": "label split", "init_seed": "initial weights", "order_seed": "order of images"}
"""Recipe fields by which a part of the randomness stays the same for all seeds, and what they fix."""


def progress_of(
    expected: int, pending: int, failed: int, refresh_s: int | None, what: str = "results"
) -> tuple[str, str]:
    """How far a run is, in words, and the class they are shown in."""
    words = f"{expected - pending} of {expected} {what}"
    if failed:
        words += f", {failed} FAILED"
    if pending:
        reloads = f"; this page reloads every {refresh_s} s" if refresh_s else ""
        return f"Not complete: {words}{reloads}", "failed" if failed else "busy"
    return words, "failed" if failed else ""


def context_of(results: Sequence[RowResult]) -> dict[str, str]:
    """What was run, where and when, in words."""
    context: dict[str, str] = {}
    if commands := {r.command for r in results if r.command}:
        context["command"] = "; ".join(sorted(commands))
    if starts := sorted(r.started for r in results if r.started):
        context["started"] = starts[0]
    if computed_on := nodes_text(node for r in results for stage in r.stages for node in stage.computed_on):
        context["computed on"] = computed_on
    if machines := dict.fromkeys(hardware_text(r.hardware) for r in results if r.hardware):
        context["planned on"] = "; ".join(machines)
    if versions := {r.code_version for r in results if r.code_version}:
        context["code"] = ", ".join(sorted(versions))
    if first := next((r for r in results if r.recipe), None):
        context["recipe"] = f"preset {first.setting('preset')}, scale {first.setting('scale')}"
        fixed = [f"{what} {seed}" for key, what in SEED_FIELDS.items() if (seed := first.setting(key)) is not None]
        if fixed:
            context["fixed seeds"] = ", ".join(fixed)
    if kinds := _kinds_of_ap(results):
        context["AP"] = " and ".join(AP_NAMES.get(kind, kind) for kind in sorted(kinds))
    if per_step := _images_per_step(results):
        context["images a step"] = per_step
    if with_data := [(r.row, r.dataset) for r in results if r.dataset is not None]:
        context["dataset"] = _dataset_text(with_data)
        context["label split"] = _splits_text([dataset.split for _, dataset in with_data if dataset.split is not None])
        hashes = dict.fromkeys(dataset.content_hash for _, dataset in with_data if dataset.content_hash)
        context["data hash"] = ", ".join(h[:16] for h in hashes)
    chains = by_rows(_chains_of(results))
    context["licences"] = ". ".join([*chains[:MAX_CHAINS], *(["and others"] if len(chains) > MAX_CHAINS else [])])
    return {key: text for key, text in context.items() if text}


def _chains_of(results: Iterable[RowResult]) -> list[tuple[str, LicenceChain]]:
    """(row, what its student inherits) of each finished result whose recipe this version can read."""
    return [(r.row, chain) for r in results if r.is_done and (chain := chain_of_plain_recipe(r.recipe)) is not None]


def _kinds_of_ap(results: Sequence[RowResult]) -> set[str]:
    return {str(metric) for r in results if (metric := r.setting("evaluation.metric")) is not None}


def _images_per_step(results: Sequence[RowResult]) -> str:
    """How many images rows with and without D_u see in a step of 2b, and which of them stay equal."""
    known = [r for r in results if r.setting("stages.distill") is not None]
    sizes = {tuple(r.setting(f"stages.distill.batch_{which}") for which in ("labelled", "unlabelled")) for r in known}
    rules = {r.setting("stages.images_per_step") or "supervised" for r in known}
    if len(sizes) != 1 or len(rules) != 1:
        return ""
    ((labelled, unlabelled),) = sizes
    if not isinstance(labelled, int) or not isinstance(unlabelled, int):
        return ""
    both = f"{labelled} labelled + {unlabelled} unlabelled, step 2b"
    if not unlabelled:
        return f"{labelled} labelled, step 2b"
    if rules == {"total"}:
        return f"{both}; rows without D_u take {labelled + unlabelled} labelled: all rows see as many images"
    return f"{both}; rows without D_u take {labelled} labelled: all rows see as many labelled images"


def hardware_text(hardware: Hardware) -> str:
    """Returns for example `AMD EPYC, 2 CPUs, 24 GB memory`, of the machine that planned a sweep."""
    cpu, num_cpus, gpu = hardware.cpu or "unknown CPU", hardware.num_cpus or "?", hardware.gpu
    return f"{cpu}, {num_cpus} CPUs, {gpu + ', ' if gpu else ''}{hardware.memory_gb or 0:.0f} GB memory"


def _dataset_text(datasets: Sequence[tuple[str, DatasetFacts]]) -> str:
    """Counts of images; a count that rows differ in (label fractions) as a range, rows that use no D_u by name.

    Args:
        datasets: (row, its dataset) of each result that says it.
    """
    counted = {
        "labelled": [(row, dataset.num_labelled) for row, dataset in datasets],
        "unlabelled": [(row, dataset.num_unlabelled) for row, dataset in datasets],
        "validation": [(row, dataset.num_val) for row, dataset in datasets],
    }
    counts = [text for what, of_rows in counted.items() if (text := _count_text(what, of_rows))]
    facts = [dataset for _, dataset in datasets]
    worst = max(facts, key=lambda dataset: dataset.skipped)
    notes = dict.fromkeys(note for dataset in facts for note in dataset.notes)
    text = ", ".join(counts) + f" images, {len(facts[0].classes)} classes"
    text = "; ".join([text, *(note.rstrip(".") for note in notes)])
    if not worst.skipped:
        return text
    return f"{text}; {worst.skipped_statement or f'{worst.skipped} unusable skipped'}"


def _count_text(what: str, of_rows: Sequence[tuple[str, int | None]]) -> str:
    """`20 to 50 labelled (unused by sup)`; empty where no result says it."""
    values = sorted({count for _, count in of_rows if count is not None})
    if not values:
        return ""
    used = [value for value in values if value] or values
    text = f"{used[0]} {what}" if len(used) == 1 else f"{used[0]} to {used[-1]} {what}"
    without = dict.fromkeys(row for row, count in of_rows if count == 0 and used != [0])
    return f"{text} (unused by {_named(list(without))})" if without else text


def _splits_text(splits: Sequence[SplitFacts]) -> str:
    """How labelled images were chosen, each way once: `nested 10 %; 6 unlabelled images of the extra pool`."""
    text = _named(list(dict.fromkeys(_split_text(split) for split in splits)))
    extra = max((split.num_extra for split in splits), default=0)
    copies = max((split.num_copies for split in splits), default=0)
    text += f"; {extra} unlabelled images of the extra pool" if extra else ""
    return text + (f"; {copies} copies of labelled or validation images left out" if copies else "")


def _split_text(split: SplitFacts) -> str:
    text = split.family or "unknown rule"
    if split.fraction is not None:
        text += f" {100 * split.fraction:.3g} %"
    if split.num_empty:
        text += f" less {split.num_empty} images without objects"
    if split.min_per_class is not None:
        text += f" with at least {split.min_per_class} images of each class"
    if split.label_list is not None:
        text += f" ({split.label_list}, sha256 {(split.label_list_sha256 or 'unknown')[:12]})"
    return text


def notes_of(report: Report) -> list[str]:
    """What a reader must know before believing the table, in plain words."""
    notes = [
        *_data_notes(report),
        *_progress_notes(report),
        *_seed_notes(report),
        *verdicts(report),
        *decision_notes(report),
    ]
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
        ("datasets", {r.dataset.content_hash for r in report.results if r.dataset} - {None}),
        ("code versions", {r.code_version for r in report.results} - {None}),
        ("kinds of AP", _kinds_of_ap(report.results)),
        ("scales", {r.setting("scale") for r in report.results} - {None}),
    ):
        if len(values) > 1:
            notes.append(f"WARNING: results of {len(values)} different {what} are mixed in this table.")
    return notes + [f"WARNING: {text}" for text in warnings_of(_chains_of(report.results))]


def _data_notes(report: Report) -> list[str]:
    """Warnings for splits, and choices of labelled images, without one object."""
    datasets = [(r.row, r.dataset) for r in report.results if r.dataset is not None]
    notes = dict.fromkeys(f"WARNING: {text}" for _, dataset in datasets for text in dataset.warnings)
    empty = dict.fromkeys(
        row for row, dataset in datasets if dataset.split is not None and dataset.split.num_with_objects == 0
    )
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
        f"WARNING: {r.row}, seed {r.seed}: its result cannot be read and is left out. {r.error}. The sweep's command "
        "writes it again."
        for r in report.results
        if r.is_unreadable
    ]
    done = [row for row in report.rows if row.seeds_done]
    aps = [cell.mean for row in done for name, cell in row.cells.items() if name.endswith("/mask_ap")]
    if aps and max(aps) < NEAR_ZERO_AP:
        steps = max(sum(stage.steps for stage in r.stages) for r in report.results)
        notes.append(
            f"AP near 0: {steps:,} training steps are too few to learn; this run only proves that the path works."
        )
    stages = [stage for r in report.results for stage in r.stages]
    empty = {stage.name for stage in stages if stage.num_pseudo_labels == 0}
    if empty:
        notes.append(
            f"WARNING: no pseudo-label at all from {', '.join(sorted(empty))}: nothing reached pseudo.score_threshold; "
            "rows that learn from pseudo-labels learnt nothing from them."
        )
    overflowed = {stage.fingerprint: stage for stage in stages if stage.skipped_steps}
    notes += [
        f"{stage.name} ({fingerprint[:8]}): float16 overflowed in {stage.skipped_steps:,} of {stage.steps:,} steps, "
        "which were left out."
        for fingerprint, stage in overflowed.items()
    ]
    bad = {stage.name: stage for stage in stages if stage.num_skipped}
    notes += [
        f"WARNING: {name} left out {stage.num_skipped} of {stage.num_skipped + (stage.num_images or 0)} unlabelled "
        f"images that it could not read, first: {', '.join(stage.skipped[:1]) or 'unknown'}."
        for name, stage in bad.items()
    ]
    return notes


def _seed_notes(report: Report) -> list[str]:
    done = [row for row in report.rows if row.seeds_done]
    most = max((len(row.seeds_done) for row in done), default=0)
    ways = {d.interval.resampled for d in report.differences if d.interval is not None}
    if report.has_one_seed and len(done) > 1:
        note = (
            "* 1 seed per row: this table is no evidence that any row is better than another. Rounding alone (the same "
            f"seed and command on another machine of the same kind) has moved an AP by up to {ROUNDING_AP} and a "
            f"difference by {ROUNDING_DIFFERENCE_AP}, and other seeds move them further. Seeds are added until rows "
            "are decided by `cast-ray ablate TABLE --until decided --budget-hours H`."
        )
        if "images" in ways:
            note += (
                f" The 95 % intervals of the report come from resampled images alone ({NUM_REPLICATES:,} draws): they "
                "are about these trained models, not about the rows."
            )
        return [note]
    if report.has_one_seed:
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
    note += (
        f", with 95 % intervals ({methods}), for a number of seeds fixed in advance and one row." if methods else "."
    )
    return [note] + ([f"* a single run, whose seed noise is unknown: {_named(singles)}."] if singles else [])


def verdicts(report: Report) -> list[str]:
    """Which rows are above, below and not distinguishable from the baseline, each by its own interval over seeds."""
    differences = [d for d in report.differences if d.metric == report.metric and not d.same_artifact]
    label, baseline = label_of(report.metric), report.baseline

    def each(chosen: Iterable[Difference]) -> str:
        return _named([f"{d.row} ({format_signed(d.metric, d.mean)})" for d in chosen])

    seeds = [d for d in differences if d.interval is not None and d.interval.resampled != "images"]
    notes = []
    if above := [d for d in seeds if d.is_clear and d.mean > 0]:
        notes.append(f"Above {baseline} in {label}: {each(above)}.")
    if below := [d for d in seeds if d.is_clear and d.mean < 0]:
        notes.append(f"Below {baseline} in {label}: {each(below)}.")
    if noise := [d for d in seeds if not d.is_clear]:
        notes.append(f"Not distinguishable from noise: {each(noise)} against {baseline} in {label}.")
    return notes


def failure_text(report: Report) -> list[str]:
    """One line a failed result: row, seed, reason and where its log is."""
    return [f"{f.row}, seed {f.seed}: {f.reason}" + (f" (log: {f.log})" if f.log else "") for f in report.failures]


def status_text(result: Result) -> str:
    """`done`, `FAILED` or `UNREADABLE`."""
    return "done" if result.is_done else "UNREADABLE" if result.is_unreadable else "FAILED"


def _named(names: Sequence[str]) -> str:
    return first_of(names, MAX_NAMED)
