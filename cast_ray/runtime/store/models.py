"""Trained models as artifacts, on any filesystem.

A segmenter is the folder of `Student.save_pretrained`, a teacher of another kind that of
`teachers.protocol.save_teacher`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cast_ray.common.digest import digest_of
from cast_ray.common.paths import absolute, join, read_bytes
from cast_ray.common.registry import lookup
from cast_ray.contracts.records import Category, class_names
from cast_ray.contracts.row_result import RowResult
from cast_ray.models.autocast import require_precision
from cast_ray.models.checkpoints import content_hash, find_checkpoint, is_hub_name
from cast_ray.models.segmenter import Segmenter
from cast_ray.models.student import CONFIG, WEIGHTS, Student, read_config
from cast_ray.plan.graph import Stage, artifact_key, input_size_of
from cast_ray.plan.reads import STUDENT_STAGES, TEACHER_STAGES
from cast_ray.plan.stage_parts import StagePart
from cast_ray.recipe import InputSize, ModelConfig, Recipe, TeacherConfig
from cast_ray.recipe.licence_chain import chain_of_plain_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore, local_copy
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.protocol import CARD as TEACHER_CARD
from cast_ray.teachers.protocol import Teacher, save_teacher
from cast_ray.teachers.protocol import load_teacher as read_teacher

FOUNDATION_VERSION = 1
"""Raised when an import makes something else of the same checkpoints."""


def save_model(
    store: ArtifactStore, stage: Stage, model: Segmenter | Teacher, categories: tuple[Category, ...]
) -> None:
    """Adds a model's files to an artifact that is not yet committed."""
    if isinstance(model, Teacher):
        model.precision = stage.precision
        with tempfile.TemporaryDirectory() as folder:
            save_teacher(model, Path(folder))
            store.add_folder(stage, Path(folder))
        return
    student = Student(
        model,
        categories,
        stage.config["data"]["image_px"],
        input_size=input_size_of(stage),
        precision=stage.precision,
    )
    for name, content in student.files().items():
        store.add(stage, name, content)


def load_student(store: ArtifactStore, key: str) -> Student:
    """A trained segmenter (a student, or a teacher that is one) with its classes, on the CPU."""
    config, weights = (store.read_bytes(key, name) for name in (CONFIG, WEIGHTS))
    return Student.from_files(config, weights, store.artifact(key))


def open_student(path: str) -> tuple[Student, RowResult | None]:
    """The student that a user means, and the result.json of its row where the path leads through one.

    Args:
        path: a folder or URI of a saved student (an artifact of the store is one), a row's folder
            `runs/<name>/<table>__<row>__s<seed>` or short `runs/<name>/<row>`, or a model's name on the hub.

    Raises:
        ValueError: no student there; the message says what was looked for, or which rows there are.
    """
    folder, result = follow_row(path, "student", STUDENT_STAGES)
    if "://" in folder:
        student = Student.from_files(*_read_files(folder), source=folder)
    else:
        student = Student.from_pretrained(folder)
    if result is not None:
        student.licences = chain_of_plain_recipe(result.recipe)
    return student, result


@contextmanager
def open_teacher(
    path: str, part: dict[str, Any], input_size: InputSize | None, categories: Sequence[Category] | None
) -> Iterator[Teacher]:
    """The teacher that a user means, on the CPU.

    Args:
        path: a folder or URI of a saved teacher or student (an artifact of the store is one), or a row's folder, as
            for `open_student`.
        part: fields of TeacherConfig that replace the saved ones.
        input_size: size at which it is given whole images; None: as saved.
        categories: to look for; None: as saved.

    Raises:
        ValueError: no teacher there, or one that does not know these classes.
    """
    folder, _ = follow_row(path, "teacher", TEACHER_STAGES)
    with local_copy(folder) as local:
        if (local / CONFIG).is_file() and not (local / TEACHER_CARD).is_file():
            student = Student.from_pretrained(local)
            if categories is not None and [c.name for c in categories] != [c.name for c in student.categories]:
                raise ValueError(f"{path!r} only knows its own classes: {', '.join(student.class_names[:12])}")
            yield _as_teacher(student, input_size)
            return
        yield read_teacher(local, part, input_size, categories)


def follow_row(path: str, what: str, wanted: Sequence[str]) -> tuple[str, RowResult | None]:
    """Follows a row of a run to the artifact of the first stage in `wanted` that it has; returns any other path as it
    is, without a result.

    Args:
        what: is looked for, for messages: student, teacher.

    Raises:
        ValueError: the row, or the run, does not have it.
    """
    local = Path(path).expanduser()
    if "://" in path or (local / CONFIG).is_file() or (local / TEACHER_CARD).is_file():
        return path if "://" in path else str(local), None
    row = local if local.is_dir() else _row_of_run(local)
    if row is None:
        return path, None
    if not (row / "result.json").is_file():
        rows = sorted(p.parent.name for p in row.glob("*/result.json"))
        hint = f"expected one of its rows: {', '.join(rows)}" if rows else f"expected {CONFIG} or result.json in it"
        raise ValueError(f"no {what} in {path!r}: {hint}")
    result = RowResult.read((row / "result.json").read_bytes(), str(row / "result.json"))
    artifacts = {stage.name: stage.artifact for stage in result.stages if stage.kind == "train"}
    for stage in wanted:
        if stage in artifacts:
            return artifacts[stage], result
    raise ValueError(f"no {what} in {path!r}: the row has not finished one ({result.error or 'no error'})")


def _row_of_run(path: Path) -> Path | None:
    """`runs/<name>/<row>` as the folder `<table>__<row>__s<seed>`; None where the run itself does not exist."""
    if not path.parent.is_dir():
        return None
    rows = sorted(p.parent for p in path.parent.glob("*__*__s*/result.json"))
    found = [row for row in rows if row.name.split("__")[1] == path.name]
    if len(found) > 1:
        raise ValueError(f"{str(path)!r} has several seeds: expected one of {', '.join(p.name for p in found)}")
    return found[0] if found else None


def load_labeller(store: ArtifactStore, stage: Stage, role: str, device: torch.device) -> Teacher:
    """The model that a label or evaluate stage predicts with, on its device: a teacher of any kind, or a student.

    Args:
        stage: whose parent `role` the model is; its config says how it is read out and in which precision.
        role: `teacher` or `model`.
        device: device of the model.

    Raises:
        ValueError: an artifact that cannot be read, or a device that is too small for the weights or does not have the
            stage's precision.
    """
    require_precision(stage.precision, device, "runtime.amp")
    key = artifact_key("train", stage.parents[role])
    teacher = load_teacher(store, key, StagePart(stage.config).teacher_settings, input_size_of(stage))
    teacher.precision = stage.precision
    try:
        return teacher.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**30
        raise ValueError(
            f"teacher.kind {teacher.kind!r}: {size:.1f} GiB of weights do not fit into the memory of {device} "
            f"({str(error).splitlines()[0]})"
        ) from None


def load_teacher(
    store: ArtifactStore,
    key: str,
    part: dict[str, Any] | None = None,
    input_size: InputSize | tuple[int, int] | None = None,
) -> Teacher:
    """A teacher from its artifact, on the CPU; of an expert or a student, the segmenter as a teacher.

    Args:
        key: key of the artifact.
        part: fields of TeacherConfig that replace the saved ones.
        input_size: size at which it is given whole images; None: as saved.

    Raises:
        ValueError: an artifact that cannot be read.
    """
    if not store.holds(key, TEACHER_CARD):
        return _as_teacher(load_student(store, key), input_size)
    with store.local_folder(key) as folder:
        return read_teacher(folder, part, input_size)


def _as_teacher(student: Student, input_size: InputSize | tuple[int, int] | None) -> ExpertTeacher:
    """A saved segmenter as a teacher; `input_size`: at which it is given whole images, None: as saved."""
    teacher = ExpertTeacher(student.segmenter, student.categories, input_size or student.input_size)
    teacher.precision = student.precision
    return teacher


def import_foundation(
    store: ArtifactStore, recipe: Recipe, categories: tuple[Category, ...], *, dry_run: bool = False
) -> str | None:
    """Brings theta_T0 into the store: `stages.foundation`, or the checkpoints of the recipe's teacher.

    Args:
        recipe: its teacher and `stages.foundation`.
        categories: classes of the dataset.
        dry_run: nothing is fetched or imported; a checkpoint that is not here yet is taken by its name.

    Returns:
        Its fingerprint, or None where the teacher is trained from scratch. It covers the contents of all checkpoints,
        the classes and how they are asked for.

    Raises:
        ValueError: no such model, one that does not load, another architecture than `teacher`, another class list than
            the dataset's, or a class that the model does not know.
    """
    config, saved = recipe.teacher, recipe.stages.foundation
    if config.kind == "expert":
        return _import_expert(store, saved, config.segmenter, categories) if saved else None
    fields = {"stages.foundation": saved} if saved else config.checkpoint_fields()
    kind: type[Teacher] = lookup("teachers", config.kind)
    with ExitStack() as copies:
        folders: dict[str, Path] = {}
        names: list[str] = []
        for field, source in fields.items():
            try:
                folders[field] = _find(copies, source, field, download=not dry_run)
                names.append(content_hash([folders[field]]))
            except ValueError:
                if not dry_run or not is_hub_name(source):
                    raise
                names.append(f"not here: {source}")
        identity = {
            **config.identity(),
            "checkpoints": names,
            "categories": [[c.id, c.name] for c in categories],
            "version": FOUNDATION_VERSION,
        }
        fingerprint = digest_of(identity)
        facts = {"imported_from": fields, "model": config.training_part()}
        stage = Stage("foundation", "train", facts, {}, fingerprint)
        if dry_run or store.has(stage.key):
            return fingerprint
        size = recipe.input_size(by_teacher=True)
        if saved:
            teacher = _saved_teacher(folders["stages.foundation"], config, categories, size)
        else:
            teacher = kind.load(folders, config, categories, size)
        with tempfile.TemporaryDirectory() as folder:
            save_teacher(teacher, Path(folder))
            store.add_folder(stage, Path(folder))
    store.commit(stage, {"seconds": 0.0})
    return fingerprint


def _find(copies: ExitStack, source: str, field: str, *, download: bool) -> Path:
    """The folder of a checkpoint or of a saved teacher, local or copied from a URI for as long as `copies` lasts."""
    if "://" in source:
        try:
            source = str(copies.enter_context(local_copy(source)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{field}: {source!r} cannot be read: {error}") from None
    if (Path(source).expanduser() / TEACHER_CARD).is_file():
        return Path(source).expanduser()
    return find_checkpoint(source, field, download=download)


def _saved_teacher(
    folder: Path, config: TeacherConfig, categories: tuple[Category, ...], input_size: InputSize
) -> Teacher:
    try:
        teacher = read_teacher(folder, {"prompt": config.prompt.model_dump()}, input_size)
    except ValueError as error:
        raise ValueError(f"stages.foundation: {error}") from None
    if teacher.kind != config.kind:
        raise ValueError(f"stages.foundation: {str(folder)!r} holds {teacher.kind!r}, teacher.kind is {config.kind!r}")
    if teacher.categories != categories:
        names, wanted = teacher.class_names, class_names(categories)
        raise ValueError(
            f"stages.foundation: {str(folder)!r} was made for {_short(names)}, the dataset has {_short(wanted)}"
        )
    return teacher


def _import_expert(store: ArtifactStore, folder: str, expected: ModelConfig, categories: tuple[Category, ...]) -> str:
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
    facts = {"imported_from": folder, "model": expected.model_dump()}
    stage = Stage("foundation", "train", facts, {}, fingerprint)
    if not store.has(stage.key):
        store.add(stage, CONFIG, config)
        store.add(stage, WEIGHTS, weights)
        store.commit(stage, {"seconds": 0.0})
    return fingerprint


def _read_files(folder: str) -> tuple[bytes, bytes]:
    """config.json and model.safetensors of a folder or URI."""
    try:
        config, weights = (read_bytes(join(absolute(folder), name)) for name in (CONFIG, WEIGHTS))
    except (OSError, ValueError) as error:
        raise ValueError(f"no saved model in {folder!r}: {error}") from None
    return config, weights


def _short(names: list[Any]) -> str:
    return ", ".join(map(str, names[:6])) + (f", ... ({len(names)})" if len(names) > 6 else "")
