"""Trained models as artifacts: the folder of `Student.save_pretrained`, on any filesystem."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cast_ray.models.segmenter import Segmenter
from cast_ray.models.student import CONFIG, WEIGHTS, Student, read_config
from cast_ray.recipe import ModelConfig
from cast_ray.records import Category
from cast_ray.runtime.store import ArtifactStore, open_uri
from cast_ray.stages.graph import Stage

STUDENT_STAGES = ("refine", "distill")
"""Whose model a row's student is: the first of these that it has."""


def save_model(store: ArtifactStore, stage: Stage, segmenter: Segmenter, categories: tuple[Category, ...]) -> None:
    """Adds a model's files to an artifact that is not yet committed."""
    student = Student(segmenter, categories, stage.config["data"]["image_px"])
    for name, content in student.files().items():
        store.add(stage, name, content)


def load_model(store: ArtifactStore, key: str) -> tuple[Segmenter, tuple[Category, ...]]:
    """A trained model and its classes, on the CPU."""
    config, weights = (store.read_bytes(key, name) for name in (CONFIG, WEIGHTS))
    student = Student.from_files(config, weights, store.artifact(key))
    return student.segmenter, student.categories


def open_student(path: str) -> tuple[Student, dict[str, Any] | None]:
    """The student that a user means, and the result.json of its row where the path leads through one.

    Args:
        path: a folder or URI of a saved student (an artifact of the store is one), a row's folder
            `runs/<name>/<table>__<row>__s<seed>` or short `runs/<name>/<row>`, or a model's name on the hub.

    Raises:
        ValueError: no student there; the message says what was looked for, or which rows there are.
    """
    folder, result = _follow(path)
    if "://" not in folder:
        return Student.from_pretrained(folder), result
    return Student.from_files(*_read_files(folder), source=folder), result


def _follow(path: str) -> tuple[str, dict[str, Any] | None]:
    """From a row of a run to the artifact of its student; any other path as it is."""
    local = Path(path).expanduser()
    if "://" in path or (local / CONFIG).is_file():
        return path if "://" in path else str(local), None
    row = local if local.is_dir() else _row_of_run(local)
    if row is None:
        return path, None
    if not (row / "result.json").is_file():
        rows = sorted(p.parent.name for p in row.glob("*/result.json"))
        hint = f"expected one of its rows: {', '.join(rows)}" if rows else f"expected {CONFIG} or result.json in it"
        raise ValueError(f"no student in {path!r}: {hint}")
    result = json.loads((row / "result.json").read_text())
    artifacts = {s["name"]: s["artifact"] for s in result["stages"] if s["kind"] == "train"}
    for stage in STUDENT_STAGES:
        if stage in artifacts:
            return artifacts[stage], result
    raise ValueError(f"no student in {path!r}: the row has not finished one ({result.get('error') or 'no error'})")


def _row_of_run(path: Path) -> Path | None:
    """`runs/<name>/<row>` as the folder `<table>__<row>__s<seed>`; None where the run itself does not exist."""
    if not path.parent.is_dir():
        return None
    rows = sorted(p.parent for p in path.parent.glob("*__*__s*/result.json"))
    found = [row for row in rows if row.name.split("__")[1] == path.name]
    if len(found) > 1:
        raise ValueError(f"{str(path)!r} has several seeds: expected one of {', '.join(p.name for p in found)}")
    return found[0] if found else None


def import_foundation(
    store: ArtifactStore, folder: str, expected: ModelConfig, categories: tuple[Category, ...]
) -> str:
    """Brings a saved teacher into the store as theta_T0 and returns its fingerprint (a hash of its weights).

    Raises:
        ValueError: no such model, another architecture than `teacher`, or another class list than the dataset's.
    """
    try:
        config, weights = _read_files(folder)
        spec = read_config(config, folder)
    except ValueError as error:
        raise ValueError(f"stages.foundation: {error}") from None
    names, wanted = [c["name"] for c in spec["categories"]], [c.name for c in categories]
    if [(c["id"], c["name"]) for c in spec["categories"]] != [(c.id, c.name) for c in categories]:
        raise ValueError(
            f"stages.foundation: {folder!r} was trained on {_short(names)}, the dataset has {_short(wanted)}"
        )
    if ModelConfig(**spec["model"]) != expected:
        raise ValueError(f"stages.foundation: the model in {folder!r} is not the recipe's `teacher`: {spec['model']}")
    fingerprint = hashlib.sha256(weights).hexdigest()[:20]
    stage = Stage("foundation", "train", {"imported_from": folder}, {}, fingerprint)
    if not store.has(stage.key):
        store.add(stage, CONFIG, config)
        store.add(stage, WEIGHTS, weights)
        store.commit(stage, {"seconds": 0.0})
    return fingerprint


def _read_files(folder: str) -> tuple[bytes, bytes]:
    """config.json and model.safetensors of a folder or URI."""
    try:
        fs, path = open_uri(folder)
        contents = []
        for name in (CONFIG, WEIGHTS):
            with fs.open_input_file(f"{path}/{name}") as file:
                contents.append(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"no saved model in {folder!r}: {error}") from None
    return contents[0], contents[1]


def _short(names: list[Any]) -> str:
    return ", ".join(map(str, names[:6])) + (f", ... ({len(names)})" if len(names) > 6 else "")
