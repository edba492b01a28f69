"""result.json: what a row ran, from which artifacts, with which numbers. Needs the store only, not Ray."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from cast_ray.records import Category
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.graph import RowPlan


@dataclass(frozen=True)
class SweepContext:
    """What every row of a sweep shares; small, sent to each trial."""

    name: str
    table: str
    command: str
    code_version: str
    hardware: dict[str, Any]
    store: ArtifactStore
    slots: int
    dataset_key: str
    """Artifact that holds the record tables (train, val and, where there is one, source)."""
    dataset: dict[str, Any]
    """content_hash, num_train, num_val, num_source, skipped, classes."""
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
    """The row's result.json as last written, done or failed; None when there is none."""
    stored = context.store.find_bytes(context.result_path(row))
    return json.loads(stored) if stored else None


def assemble_result(context: SweepContext, row: RowPlan, ran: set[str]) -> dict[str, Any]:
    """result.json of a row from the artifacts in the store, without the outcome (status, error, seconds).

    Args:
        ran: fingerprints of the stages that this row ran itself; the others it shared.
    """
    store = context.store
    stages: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    curves: dict[str, Any] = {}
    diagnostics: dict[str, Any] = {}
    device_seconds = 0.0
    facts_of: dict[str, dict[str, Any]] = {}
    for stage in row.stages:
        if not store.has(stage.key):
            continue
        facts = facts_of[stage.fingerprint] = store.manifest(stage.key)
        if stage.fingerprint in ran:
            device_seconds += facts["stage_seconds"] * facts["num_workers"]
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "fingerprint": stage.fingerprint,
                "artifact": store.artifact(stage.key),
                "reused": stage.fingerprint not in ran,
                "steps": stage.steps,
                **{
                    k: facts.get(k)
                    for k in ("seconds", "stage_seconds", "startup_seconds", "images_per_s", "resumed_at_step")
                },
                **{k: facts[k] for k in ("num_pseudo_labels",) if k in facts},
            }
        )
        if stage.kind == "train":
            history = store.read_json(stage.key, "curves.json")
            curves[stage.name], diagnostics[stage.name] = history["curve"], history["diagnostics"]
    for role, stage in row.roles.items():
        if stage.kind == "evaluate" and stage.fingerprint in facts_of:
            measured = store.read_json(stage.key, "metrics.json")
            metrics |= {f"{role}/{k}": v for k, v in measured.items() if isinstance(v, (int, float))}
    last = facts_of.get(row.roles["distill"].fingerprint, {})
    return {
        "table": context.table,
        "row": row.row,
        "seed": row.seed,
        "recipe": row.recipe.model_dump(),
        "command": context.command,
        "code_version": context.code_version,
        "device_hours": device_seconds / 3600,
        "hardware": context.hardware,
        "dataset": context.dataset | {k: last.get(k) for k in ("num_labelled", "num_unlabelled")},
        "stages": stages,
        "metrics": metrics,
        "curves": curves,
        "diagnostics": diagnostics,
    }


def result_from_store(context: SweepContext, row: RowPlan) -> dict[str, Any]:
    """The result of a row all of whose stages were already stored."""
    outcome = {"status": "done", "error": None, "log": None, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return assemble_result(context, row, ran=set()) | outcome | {"seconds": 0.0}
