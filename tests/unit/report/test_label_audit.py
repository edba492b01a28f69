"""The audit of pseudo-labels in the report: its table, its figure and its page of worst cases."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from evaluation_scenes import CATEGORIES, HEIGHT, WIDTH, random_scenes
from PIL import Image

from cast_ray.contracts.records import RECORD_SCHEMA, ClassMap, encode_image_id
from cast_ray.contracts.row_result import DatasetFacts, Hardware
from cast_ray.evaluation.label_audit import audit_images, summarise_audit
from cast_ray.plan.graph import RowPlan, Stage, plan
from cast_ray.publish.label_audit import NUM_WORST, worst_cases
from cast_ray.recipe import build_recipe
from cast_ray.report.content import Result
from cast_ray.report.label_audit import audit_table, coverage_table, precision_table
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep.row_results import SweepContext

CLASSES = ClassMap(CATEGORIES)
IDS = tuple(range(3, 13))


def scenes(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Hidden ground truth and labels of the same images."""
    table, results = random_scenes(seed, IDS, num_detections=6)
    truth, labels = table.to_pylist(), []
    for position, row in enumerate(truth):
        mine = [r for r in results if encode_image_id(r["image_id"]) == row["image_id"]]
        instances = [
            {"category_id": r["category_id"], "rle": r["segmentation"]["counts"].encode()}
            | {"score": r["score"], "is_crowd": False}
            for r in mine
        ]
        labels.append(row | {"instances": instances, "position": position})
    return truth, labels


def audit_of(seed: int) -> dict[str, Any]:
    audit = summarise_audit(audit_images(*scenes(seed), CLASSES), CLASSES)
    assert audit is not None
    return json.loads(json.dumps(audit))


def result(row: str, **audits: dict[str, Any]) -> Result:
    names = {name.replace("_", "-"): audit for name, audit in audits.items()}
    stages = [{"name": name, "kind": "label", "fingerprint": f"{name}-{audit['ap']}"} for name, audit in names.items()]
    plain = {"table": "losses", "row": row, "seed": 0, "status": "done", "pseudo_labels": names, "stages": stages}
    return Result.of(plain, "result.json")


def test_the_table_names_every_stage_size_and_class() -> None:
    audit = audit_of(0)
    head, body = audit_table(result("a", label_adapted=audit, label_teacher=audit_of(1)))
    assert all(len(line) == len(head) for line in body)
    groups = ["all", "small", "medium", *(c.name for c in CATEGORIES)]
    shown = [line[1] for line in body if line[0] == "label-adapted"]
    assert [g for g in shown if g != "large"] == groups
    first = dict(zip(head, body[0]))
    assert first["labels"] == str(audit["num_labels"]) and first["AP50"] == f"{audit['ap50']:.1f}"
    assert first["errors"] == " / ".join(str(audit["errors"][kind]) for kind in audit["errors"])
    head, body = coverage_table(result("a", label_adapted=audit))
    assert all(len(line) == len(head) for line in body) and body[0][1] == str(len(IDS))
    assert audit_table(result("sup"))[1] == coverage_table(result("sup"))[1] == []


def test_left_overs_and_suppressed_predictions_have_columns() -> None:
    truth, labels = scenes(0)
    for row in labels:
        row["instances"] = [
            i | {"visible_share": 0.3 if k % 2 else 1.0, "num_suppressed": 1} for k, i in enumerate(row["instances"])
        ]
    audit = summarise_audit(audit_images(truth, labels, CLASSES), CLASSES)
    assert audit is not None
    head, body = coverage_table(result("a", label_adapted=audit))
    cells, left_overs = dict(zip(head, body[0])), audit["visibility"]["left_overs"]
    assert cells["left-overs"] == str(left_overs["num_labels"]) != "0"
    assert cells["precision of left-overs"] == f"{left_overs['precision']:.1f}"
    assert cells["suppressed"] == str(sum(len(row["instances"]) for row in labels))
    old = {name: value for name, value in audit.items() if name not in ("visibility", "num_suppressed")}
    head, body = coverage_table(result("a", label_adapted=old))
    assert dict(zip(head, body[0]))["left-overs"] == dict(zip(head, body[0]))["suppressed"] == ""


def test_no_labels_leave_empty_cells() -> None:
    truth, labels = scenes(0)
    empty = summarise_audit(audit_images(truth, [row | {"instances": []} for row in labels], CLASSES), CLASSES)
    assert empty is not None
    head, body = audit_table(result("a", label_teacher=empty))
    assert dict(zip(head, body[0]))["precision"] == dict(zip(head, body[0]))["ECE"] == ""


def write(store: ArtifactStore, stage: Stage, files: dict[str, pa.Table | bytes], **facts: Any) -> None:
    for name, content in files.items():
        if isinstance(content, pa.Table):
            buffer = io.BytesIO()
            pa.parquet.write_table(content, buffer)
            content = buffer.getvalue()
        store.add(stage, name, content)
    store.commit(stage, facts)


@pytest.fixture
def swept(tmp_path: Path) -> tuple[SweepContext, RowPlan]:
    """A row whose labels and dataset are in the store, its images on disk."""
    store = ArtifactStore(str(tmp_path / "storage"))
    truth, labels = scenes(0)
    for k, row in enumerate(truth):
        row["uri"] = str(tmp_path / f"{k}.png")
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 20 * k, dtype=np.uint8)).save(row["uri"])
    row_plan = plan(build_recipe("shapes", "smoke"), "0" * 64)
    dataset = Stage("dataset", "dataset", {}, {}, "d" * 20)
    facts = {"content_hash": "0" * 64, "categories": [vars(c) for c in CATEGORIES], "num_images": {"train": len(truth)}}
    write(store, dataset, {"train.parquet": pa.Table.from_pylist(truth, schema=RECORD_SCHEMA)}, **facts)
    schema = RECORD_SCHEMA.append(pa.field("position", pa.int64()))
    files: dict[str, pa.Table | bytes] = {
        f"labels/{k}.parquet": pa.Table.from_pylist(labels[k::3], schema=schema) for k in range(3)
    }
    write(store, row_plan.roles["label-teacher"], files | {"audit.json": json.dumps(audit_of(0)).encode()})
    context = SweepContext(
        "run", "losses", "", "", Hardware(), store, dataset.key, DatasetFacts(), CATEGORIES, "runs/run"
    )
    return context, row_plan


def test_the_page_of_worst_cases_has_a_line_an_image(swept: tuple[SweepContext, RowPlan], tmp_path: Path) -> None:
    context, row = swept
    path = tmp_path / "out" / "worst.png"
    assert worst_cases(context, row, path)
    page = Image.open(path)
    assert page.width > 3 * WIDTH and page.height > NUM_WORST * HEIGHT
    drawn = path.read_bytes()
    (tmp_path / "0.png").unlink()  # the page is kept: nothing is drawn again
    assert worst_cases(context, row, path) and path.read_bytes() == drawn


def test_a_row_without_labels_or_audit_has_no_page(swept: tuple[SweepContext, RowPlan], tmp_path: Path) -> None:
    context, row = swept
    alone = plan(build_recipe("shapes", "smoke", {"loss.lambda_semi": "0"}), "0" * 64)
    assert not worst_cases(context, alone, tmp_path / "worst.png")
    context.store.discard(row.roles["label-teacher"], "audit.json")
    assert not worst_cases(context, row, tmp_path / "worst.png")
    assert not (tmp_path / "worst.png").exists()


def test_held_precisions_stand_beside_what_was_measured() -> None:
    audit = audit_of(1)
    names = list(audit["per_class"])
    groups = [
        {"classes": names[:1], "threshold": 0.61, "num_labels": 40, "num_right": 38, "bound": 0.85, "num_images": 20},
        {"classes": names[1:], "num_labels": 30, "num_right": 12, "bound": 0.25, "num_images": 18},
    ]
    held = {"precision": 0.8, "error": 0.1, "num_images": 25, "num_folds": 5, "groups": groups}
    plain = result("a", label_teacher=audit).plain()
    plain["stages"][0]["held_precision"] = held
    head, body = precision_table(Result.of(plain, "result.json"))
    assert head[2:7] == ["threshold", "promised", "labels of D_l", "right on D_l", "lower bound"]
    mine = audit["per_class"][names[0]]
    assert body[0] == [
        *("label-teacher", names[0], "0.61", "80.0", "40", "95.0", "85.0"),
        str(mine["num_labels"]),
        f"{mine['precision']:.1f}",
    ]
    others = [audit["per_class"][name] for name in names[1:]]
    count = sum(rates["num_labels"] for rates in others)
    right = sum(rates["num_labels"] * (rates["precision"] or 0) for rates in others)
    left_out = [", ".join(names[1:]), "left unlabelled", "80.0", "30", "40.0", "25.0"]
    assert body[1][1:] == [*left_out, str(count), f"{right / count:.1f}"]
    unknown = Result.of({**plain, "pseudo_labels": {}}, "result.json")  # nobody knows the truth of D_u
    assert [line[7:] for line in precision_table(unknown)[1]] == [["", ""], ["", ""]]
    assert precision_table(result("b", label_teacher=audit))[1] == []
