"""result.json: what a row ran, from which artifacts, with which numbers. Needs the store only, not Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cast_ray.contracts.records import Category
from cast_ray.plan.graph import RowPlan, Stage, given
from cast_ray.runtime.data.splits import stored_split
from cast_ray.runtime.store.artifact_files import AUDIT, MATCHES, METRICS
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each

MAX_SKIPPED_NAMED = 20


@dataclass(frozen=True)
class SweepContext:
    """What the rows of one table and dataset share; small, sent to each trial."""

    name: str
    """Name of the run: `<table>-<preset>-<scale>` unless the user chose another."""
    table: str
    command: str
    code_version: str
    hardware: dict[str, Any]
    store: ArtifactStore
    dataset_key: str
    """Artifact that holds the record tables (train, val and, where there is one, source)."""
    dataset: dict[str, Any]
    """See `StoredDataset.facts`."""
    categories: tuple[Category, ...]
    runs_path: str
    """Where result.json files go, below the storage path."""

    def result_path(self, row: RowPlan) -> str:
        """Path of a row's result.json below the storage path."""
        return f"{self.runs_path}/{row_name(self.table, row)}/result.json"


def row_name(table: str, row: RowPlan) -> str:
    """`<table>__<row>__s<seed>`: name of a row's trial and directory of its result."""
    return f"{table}__{row.row}__s{row.seed}"


def read_result(context: SweepContext, row: RowPlan) -> dict[str, Any] | None:
    """The row's result.json as last written, done or failed; None when there is none, or one that is cut."""
    stored = context.store.find_bytes(context.result_path(row))
    try:
        return json.loads(stored) if stored else None
    except ValueError:  # its stages are in the store, and it is made from them again
        return None


@lru_cache(maxsize=64)
def _read_committed(storage: str, key: str) -> dict[str, Any]:
    """Manifest, place and numbers of an artifact, which never change once it is committed.

    Raises:
        FileNotFoundError: it is not (the next call looks again).
    """
    store = ArtifactStore(storage)
    manifest = store.manifest(key)
    numbers = {"train": "curves.json", "evaluate": METRICS, "label": AUDIT}.get(manifest["kind"])
    found = store.find_file(key, numbers) if numbers else None  # not every labelling stage has an audit
    return {"manifest": manifest, "artifact": store.artifact(key), "numbers": json.loads(found) if found else {}}


def _find_committed(storage: str, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Fingerprint -> what is committed, of those stages that are."""

    def read(stage: Stage) -> dict[str, Any] | None:
        try:
            return _read_committed(storage, stage.key)
        except FileNotFoundError:
            return None

    found = zip(stages, read_each(read, stages))
    return {stage.fingerprint: artifact for stage, artifact in found if artifact is not None}


def assemble_result(context: SweepContext, row: RowPlan, ran: set[str]) -> dict[str, Any]:
    """result.json of a row from the artifacts in the store, without the outcome (status, error, seconds).

    Args:
        ran: fingerprints of the stages that this row ran itself; the others it shared.
    """
    committed = _find_committed(context.store.storage, row.stages)
    stages: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    evaluations: dict[str, str] = {}
    curves: dict[str, Any] = {}
    diagnostics: dict[str, Any] = {}
    pseudo_labels: dict[str, Any] = {}
    per_class: dict[str, Any] = {}
    device_seconds = 0.0
    for stage in row.stages:
        if stage.fingerprint not in committed:
            continue
        artifact = committed[stage.fingerprint]
        facts = artifact["manifest"]
        if facts.get("owner") == row_name(context.table, row):  # in this run or one before it
            device_seconds += facts["stage_seconds"] * facts["num_workers"]
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "fingerprint": stage.fingerprint,
                "artifact": artifact["artifact"],
                "reused": stage.fingerprint not in ran,
                "steps": stage.steps,
                "num_workers": facts["num_workers"],
                **{
                    k: facts.get(k)
                    for k in (
                        "seconds",
                        "stage_seconds",
                        "startup_seconds",
                        "images_per_s",
                        "resumed_at_step",
                        "skipped_steps",
                    )
                },
                **(_label_facts(facts) if stage.kind == "label" else {}),
            }
        )
        if stage.kind == "train":
            curves[stage.name] = artifact["numbers"]["curve"]
            diagnostics[stage.name] = artifact["numbers"]["diagnostics"]
        if stage.kind == "label" and artifact["numbers"]:
            pseudo_labels[stage.name] = artifact["numbers"]
    for role, stage in row.roles.items():
        if stage.kind == "evaluate" and stage.fingerprint in committed:
            measured = committed[stage.fingerprint]["numbers"]
            metrics |= {f"{role}/{k}": v for k, v in measured.items() if isinstance(v, (int, float))}
            per_class[role] = measured["per_class"]
            evaluations[role] = stage.fingerprint
            _add_final_point(row, curves, stage, measured)
    last = committed.get(row.roles["distill"].fingerprint, {"manifest": {}})["manifest"]
    return {
        "table": context.table,
        "row": row.row,
        "seed": row.seed,
        "recipe": row.recipe.model_dump(),
        "command": context.command,
        "code_version": context.code_version,
        "device_hours": device_seconds / 3600,
        "hardware": context.hardware,
        "dataset": context.dataset
        | {k: last.get(k) for k in ("num_labelled", "num_unlabelled")}
        | {"split": _split_facts(context, row)},
        "stages": stages,
        "given": sorted(given(row)),
        "metrics": metrics,
        "per_class": per_class,
        "evaluations": evaluations,
        "curves": curves,
        "diagnostics": diagnostics,
        "pseudo_labels": pseudo_labels,
    }


def _label_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """How many labels a labelling stage gave, and which images it could not read: their number, the first by name."""
    skipped = [row["error"] for row in facts.get("skipped", [])]
    counts = {name: facts[name] for name in ("num_images", "num_pseudo_labels") if name in facts}
    return counts | {"num_skipped": len(skipped), "skipped": skipped[:MAX_SKIPPED_NAMED]}


def _split_facts(context: SweepContext, row: RowPlan) -> dict[str, Any]:
    """How the row's D_l and D_u were chosen."""
    part = row.roles["distill"].config["split"]
    return stored_split(context.store, context.dataset["content_hash"], part).facts


def _add_final_point(
    row: RowPlan, curves: dict[str, list[dict[str, float]]], evaluation: Stage, measured: dict[str, Any]
) -> None:
    """Ends the curve of a stage that was validated while it trained with what its evaluation measured."""
    for stage in row.stages:
        if stage.fingerprint != evaluation.parents["model"] or stage.name not in curves:
            continue
        curve = curves[stage.name]
        if any("val/mask_ap" in entry for entry in curve) and curve[-1]["step"] == stage.steps:
            final = {f"val/{k}": measured[k] for k in ("mask_ap", "ap50") if measured[k] is not None}
            curves[stage.name] = [*curve[:-1], curve[-1] | final]


def read_matches(context: SweepContext, row: RowPlan) -> Iterator[tuple[str, bytes]]:
    """(role, content of `evaluation.matches.load_matches`' file) of every evaluation of a row that is stored."""
    for role, stage in row.roles.items():
        if stage.kind == "evaluate" and role != "final":  # a second name of one of them
            content = context.store.find_file(stage.key, MATCHES)
            if content is not None:
                yield role, content


def result_from_store(context: SweepContext, row: RowPlan) -> dict[str, Any]:
    """The result of a row all of whose stages were already stored."""
    outcome = {"status": "done", "error": None, "log": None, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return assemble_result(context, row, ran=set()) | outcome | {"seconds": 0.0}


def is_current(result: dict[str, Any] | None, row: RowPlan) -> bool:
    """Whether a stored result is a finished one, made from exactly this row's stages."""
    if result is None or result["status"] != "done":
        return False
    return {s["fingerprint"] for s in result["stages"]} == {s.fingerprint for s in row.stages}
