"""A recipe cut into stages, each with a fingerprint of everything that can change its result.

    pretrain --+--> adapt (1a) --> label (1b) --+--> teacher --> label (2a) --+--> distill (2b) --> refine (3)
               +------------------ selftrain (1c)

With `pseudo.precision`, a label stage also waits for labels of D_l by teachers that have not been trained on them: 1a,
or 1c, once more for each fold of D_l that it leaves out (`adapt-fold1`), and a label stage of the fold
(`label-adapted-fold1`).

A stage's fingerprint is sha256 over its kind and version, its own part of the recipe, its parents' fingerprints and the
dataset's content hash. Equal fingerprints are one artifact, whatever rows, seeds or sweeps ask for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cast_ray.common.digest import digest_of
from cast_ray.common.registry import check_call, import_named
from cast_ray.contracts.held_precision import FOLD, is_of_fold
from cast_ray.plan.reads import (
    STUDENT_STAGES,
    TrainStage,
    contrast_weight,
    num_folds_of,
    reads_labels,
    reads_unlabelled,
)
from cast_ray.recipe import InputSize, Precision, Recipe, TrainConfig
from cast_ray.recipe.part import identity_of

Kind = Literal["train", "label", "evaluate", "dataset"]

STAGE_VERSION: dict[str, int] = {"train": 3, "label": 3, "evaluate": 2}
"""Raise a kind's number when its code changes a result: its old artifacts are then no longer found."""


# Marks at the fields say how they enter a fingerprint (`recipe/part.py`). Here is which of them a stage reads.
OF_STUDENT = ("semi_view", "burn_in_fraction", "soft_targets")
"""Fields of the loss that act only on a student with pseudo-labels."""
EXTRA_TERM = ("extra_term", "extra_weight")
"""Fields of the loss that act in step 2b alone, and only where there is such a term."""


VIEW_FIELDS = (
    "image_px",
    "scale_jitter",
    "flip",
    "color_jitter",
    "train_resize",
    "scale_steps",
    "whole_images",
    "inference_resize",
    "color",
)
"""Fields of DataConfig that decide what a train stage's model sees."""


HELD_OUT = "held-out "
"""Begin of the roles of a label stage's parents that are labels of folds of D_l, a number after it."""


class NoTeacherError(ValueError):
    """A row's images would be labelled by a teacher that nothing has trained."""


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    name: unique within a row but for evaluations; kind: which code runs it (`dataset`: read before the sweep); config:
    its part of the recipe, as plain data; parents: role -> fingerprint of the artifact it reads; steps: optimiser steps
    (0 unless train); online: the label stage that it does not read but makes as it goes, whose teacher is then its own
    parent. The fingerprint is that of the stage that reads the labels: a frozen teacher's are the same.
    """

    name: str
    kind: Kind
    config: dict[str, Any]
    parents: dict[str, str]
    fingerprint: str
    steps: int = 0
    online: Stage | None = None

    @property
    def key(self) -> str:
        """Directory name of the artifact."""
        return artifact_key(self.kind, self.fingerprint)

    @property
    def step(self) -> str:
        """The name without the number of a fold: which part of `recipe.stages` says how a train stage optimises."""
        return self.name.partition(FOLD)[0]

    @property
    def is_of_fold(self) -> bool:
        """Whether it is there only to choose the thresholds of another stage, on a fold of D_l."""
        return is_of_fold(self.name)

    @property
    def held_out(self) -> list[str]:
        """Fingerprints of the label stages of all folds of D_l, in order, that a label stage reads."""
        return [parent for role, parent in self.parents.items() if role.startswith(HELD_OUT)]

    @property
    def precision(self) -> Precision:
        """What the stage computes in."""
        return self.config.get("precision", "off")


def artifact_key(kind: str, fingerprint: str) -> str:
    """Directory name of an artifact: no name of a stage in it, because equal stages may be called differently."""
    return f"{kind}-{fingerprint}"


def parent_key(role: str, fingerprint: str) -> str:
    """Directory name of the artifact that a stage reads in a role."""
    return artifact_key("label" if role == "labels" or role.startswith(HELD_OUT) else "train", fingerprint)


def fingerprint_of(key: str) -> str:
    """The fingerprint in an artifact's directory name."""
    return key.rpartition("-")[2]


@dataclass(frozen=True)
class RowPlan:
    """The stages of one row and seed, parents before children; roles name the artifacts the result is read from.

    `final` is the evaluation of the row's last student, refined or not.
    """

    row: str
    seed: int
    recipe: Recipe
    stages: tuple[Stage, ...]
    roles: dict[str, Stage] = field(default_factory=dict)

    @property
    def student_stages(self) -> list[Stage]:
        """The train stages of the row's student, the last first: the first of these trains the model that results."""
        return [self.roles[name] for name in STUDENT_STAGES if name in self.roles]


@dataclass(frozen=True)
class DataHashes:
    """Identity of what a recipe's data part names beside the dataset: its extra pool and label lists."""

    extra: str = ""
    label_list: str = ""
    unlabelled_list: str = ""


def plan(
    recipe: Recipe,
    content_hash: str,
    *,
    row: str = "",
    has_source: bool = True,
    foundation: str | None = None,
    hashes: DataHashes = DataHashes(),
) -> RowPlan:
    """The stages of one recipe.

    Args:
        recipe: the row's resolved recipe.
        content_hash: identity of images and annotations (`DatasetSplits.content_hash`).
        row: name of the row, for display.
        has_source: whether the dataset has a source style to pre-train the teacher on.
        foundation: fingerprint of an imported theta_T0 (a teacher's checkpoints, or `stages.foundation`), which takes
            the place of pre-training; needed by every kind of teacher but `expert`.
        hashes: hashes of the extra pool and the label lists, if the recipe names them.

    Raises:
        ValueError: the recipe needs pseudo-labels and has no teacher to make them.
    """
    return _Planner(recipe, content_hash, row, has_source, foundation, hashes).build()


def split_part(recipe: Recipe, hashes: DataHashes, *, unlabelled: bool) -> dict[str, Any]:
    """What the choice of D_l (and D_u, where it is used) depends on beside the dataset: equal parts, equal images."""
    data = recipe.data
    part: dict[str, Any] = {
        "family": data.label_family,
        "fraction": data.label_fraction,
        "seed": recipe.seed if data.split_seed is None else data.split_seed,
    }
    if data.label_family == "per-class":
        part["min_per_class"] = data.min_per_class
    if data.label_list:
        part["label_list"] = hashes.label_list
    part |= identity_of(data, include=("drop_empty",))
    if unlabelled:
        part["pool"] = data.unlabelled_pool
        part |= identity_of(data, include=("unlabelled_fraction", "num_unlabelled"))
        if data.unlabelled_list:
            part["unlabelled_list"] = hashes.unlabelled_list
        if data.unlabelled_pool != "rest":
            part["extra"] = hashes.extra
    return part


class _Planner:
    def __init__(
        self,
        recipe: Recipe,
        content_hash: str,
        row: str,
        has_source: bool,
        foundation: str | None,
        hashes: DataHashes,
    ):
        self.recipe, self.content_hash, self.row = recipe, content_hash, row
        self.has_source, self.foundation, self.hashes = has_source, foundation, hashes
        self.stages: list[Stage] = []
        self.roles: dict[str, Stage] = {}

    def build(self) -> RowPlan:
        recipe, stages = self.recipe, self.recipe.stages
        assert self.foundation is not None or recipe.teacher.kind == "expert"

        foundation: Stage | None = None
        if self.foundation is not None:
            foundation = Stage("foundation", "train", {}, {}, self.foundation)
            self.evaluate("zero_shot", foundation, by_teacher=True)
        elif self.has_source and stages.pretrain.steps > 0:
            foundation = self.train("pretrain")
            self.evaluate("zero_shot", foundation, by_teacher=True)

        teacher = foundation
        if stages.use_adapt:
            teacher = self.train("adapt", init=foundation)
            if reads_labels(recipe, "selftrain"):
                adapted = self.label("label-adapted", teacher, self.held_out("adapt", teacher, foundation))
                teacher = self.train("selftrain", init=foundation, labels=adapted)
        if teacher is not None:
            self.evaluate("teacher", teacher, by_teacher=True)

        use_labels = reads_labels(recipe, "distill")
        if use_labels and teacher is None:
            raise NoTeacherError(
                "stages.use_adapt is false and there is no pre-trained teacher (stages.pretrain.steps is 0 or the "
                "dataset has no source images): nothing can label the unlabelled images (stages.foundation=DIR)"
            )
        labels: Stage | None = None
        if use_labels and teacher is not None:
            held_out = self.held_out("selftrain", teacher, foundation, self.roles.get("label-adapted"))
            labels = self.label("label-teacher", teacher, held_out, for_student=True)
        student = self.train("distill", labels=labels)
        self.roles["final"] = self.evaluate("student", student)
        if stages.use_refine and stages.refine.steps > 0:
            refined = self.train("refine", init=student)
            self.roles["final"] = self.evaluate("refined", refined)
        return RowPlan(self.row, recipe.seed, recipe, tuple(self.stages), self.roles)

    def held_out(
        self, name: TrainStage, teacher: Stage, foundation: Stage | None, labels: Stage | None = None
    ) -> list[Stage]:
        """Labels of each fold of D_l by a teacher that is trained like `teacher` without the fold; [] without folds.

        Args:
            name: the stage that trains the teacher on D_l.
            foundation: what that stage starts from.
            labels: pseudo-labels of D_u that it reads. They are the row's own, so that images of the fold have reached
                the teacher of a fold of 1c through these alone.
        """
        num_folds = num_folds_of(self.recipe)
        role = {"adapt": "label-adapted", "selftrain": "label-teacher"}[name]
        found = []
        for index in range(num_folds):
            fold = {"index": index, "of": num_folds}
            of_fold = teacher
            if teacher is not foundation:
                of_fold = self.train(name, init=foundation, labels=labels, fold=fold)
            found.append(self.label(f"{role}{FOLD}{index + 1}", of_fold, fold=fold))
        return found

    def train(
        self,
        name: TrainStage,
        *,
        init: Stage | None = None,
        labels: Stage | None = None,
        fold: Mapping[str, int] | None = None,
    ) -> Stage:
        recipe, train = self.recipe, getattr(self.recipe.stages, name)
        by_teacher, is_source = name not in STUDENT_STAGES, name == "pretrain"
        pxl, unlabelled = contrast_weight(recipe, name), reads_unlabelled(recipe, name)
        assert (labels is not None) == reads_labels(recipe, name), name
        has_extra = name == "distill" and bool(recipe.loss.extra_term)
        config: dict[str, Any] = {
            "model": recipe.teacher.training_part() if by_teacher else identity_of(recipe.student),
            "train": self._optimisation_part(name, train, unlabelled),
            "data": self._view_part(name, by_teacher),
            "split": None if is_source else self._split_part(unlabelled, fold, "others"),
            "source": is_source,
            "unlabelled": unlabelled,
            "loss": self._loss_part(by_teacher, has_labels=labels is not None, has_extra=has_extra, pxl=pxl),
            "contrastive": identity_of(recipe.contrastive) if pxl > 0 else None,
            # theta_T0 stands for a published foundation model: one for all seeds, as a downloaded checkpoint would be.
            "seed": 0 if is_source else recipe.seed,
        }
        if not is_source:  # only where they differ, so that naming the default changes no fingerprint
            own = {"init_seed": recipe.init_seed, "order_seed": recipe.order_seed}
            config |= {name: value for name, value in own.items() if value not in (None, recipe.seed)}
        if has_extra:
            config["extra_term_code"] = _code_digest(recipe.loss.extra_term)
        refresh = recipe.labels.refresh_steps
        if labels is not None and name in recipe.labels.refresh_stages and refresh:
            config["refresh_steps"] = refresh
        number = "" if fold is None else f"{FOLD}{fold['index'] + 1}"
        stage = self._stage(f"{name}{number}", "train", config, {"init": init, "labels": labels}, train.steps)
        if labels is not None and recipe.labels.mode == "online":
            parents = {"teacher": labels.parents["teacher"]} | ({"init": init.fingerprint} if init else {})
            stage = replace(stage, parents=parents, online=labels)
        return self._add(stage)

    def _optimisation_part(self, name: TrainStage, train: TrainConfig, unlabelled: bool) -> dict[str, Any]:
        """How a train stage optimises, without what it does not use."""
        part = identity_of(train)
        if not unlabelled:
            added = part.pop("batch_unlabelled")
            if name == "distill" and self.recipe.stages.images_per_step == "total":
                part["batch_labelled"] += added
        return part

    def _loss_part(self, by_teacher: bool, *, has_labels: bool, has_extra: bool, pxl: float) -> dict[str, Any]:
        """The terms of a train stage. A teacher's self-training weighs L_semi by 1."""
        loss = self.recipe.loss
        of_student = () if has_labels and not by_teacher else OF_STUDENT
        part = identity_of(loss, exclude=of_student if has_extra else (*of_student, *EXTRA_TERM))
        semi = 1.0 if by_teacher else loss.lambda_semi
        part |= {"lambda_semi": semi if has_labels else 0.0, "lambda_pxl": pxl}
        if not has_labels:
            part.pop("pseudo_weighting")
        return part

    def _split_part(self, unlabelled: bool, fold: Mapping[str, int] | None, images: str) -> dict[str, Any]:
        """The images of a stage; of one that is there for a fold of D_l, `images` says which, see `folds.fold_of`."""
        part = split_part(self.recipe, self.hashes, unlabelled=unlabelled)
        return part if fold is None else part | {"fold": {**fold, "images": images}}

    def label(
        self,
        name: str,
        teacher: Stage,
        held_out: Sequence[Stage] = (),
        *,
        for_student: bool = False,
        fold: Mapping[str, int] | None = None,
    ) -> Stage:
        """A label stage, of D_u or of a fold of D_l; `held_out`: labels of D_l that its thresholds are chosen on."""
        pseudo = self.recipe.pseudo
        idle = () if pseudo.has_vote else ("vote_iou",)
        if fold is not None:  # labels of any score, for whatever precision is asked for
            idle = (*idle, "precision", "precision_error", "precision_folds")
        config = {
            "pseudo": identity_of(pseudo, exclude=idle),
            "data": self.recipe.input_size(by_teacher=True).part(),
            "split": self._split_part(fold is None, fold, "held out"),
            "batch": self.recipe.label_batch,
        }
        if part := self.recipe.teacher.inference_part():
            config["teacher"] = part
        if for_student and self.recipe.loss.soft_targets != "off":
            config["soft"] = True
        parents: dict[str, Stage | None] = {"teacher": teacher}
        parents |= {f"{HELD_OUT}{number}": labels for number, labels in enumerate(held_out, 1)}
        stage = self._stage(name, "label", config, parents)
        return stage if self.recipe.labels.mode == "online" else self._add(stage)

    def evaluate(self, role: str, model: Stage, by_teacher: bool = False) -> Stage:
        config: dict[str, Any] = {
            "evaluation": identity_of(self.recipe.evaluation),
            "data": self.recipe.input_size(by_teacher).part(),
        }
        if by_teacher and (part := self.recipe.teacher.inference_part()):
            # Average precision is an area over all scores: a threshold would only cut it off.
            config["teacher"] = {"inference": part["inference"] | {"score_threshold": 0.0}}
        stage = self._add(self._stage("evaluate", "evaluate", config, {"model": model}))
        self.roles[role] = stage
        return stage

    def _view_part(self, name: TrainStage, by_teacher: bool) -> dict[str, Any]:
        """How a train stage makes its views, and the size at which its model sees whole images afterwards.

        Fields that others make idle are left out.
        """
        data, teacher = self.recipe.data, self.recipe.teacher
        own_px = teacher.image_px if by_teacher else None
        changes: dict[str, Any] = {"inference_resize": self.recipe.input_size(by_teacher).resize}
        if own_px is not None:
            changes["image_px"] = own_px
        elif by_teacher and teacher.kind != "expert":
            changes |= {"whole_images": True, "train_resize": "native"}
        seen = data.model_copy(update=changes)
        idle = set[str]()
        if seen.whole_images:
            idle |= {"scale_jitter", "scale_steps"}
            if "fit" not in (seen.train_resize, seen.inference_resize):
                idle.add("image_px")
        if seen.color != "jitter":
            idle.add("color_jitter")
        read = (*VIEW_FIELDS, "copy_paste") if name == "distill" else VIEW_FIELDS
        return identity_of(seen, include=read, exclude=idle)

    def _stage(
        self, name: str, kind: Kind, config: dict[str, Any], parents: dict[str, Stage | None], steps: int = 0
    ) -> Stage:
        parent_prints = {role: parent.fingerprint for role, parent in parents.items() if parent is not None}
        precision = self.recipe.runtime.precision
        if precision != "off":  # float32 is left out, as it was before precision was a part of what a stage is
            config = config | {"precision": precision}
        fingerprint = stage_fingerprint(kind, config, parent_prints, self.content_hash)
        return Stage(name, kind, config, parent_prints, fingerprint, steps)

    def _add(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        if stage.kind != "evaluate":
            self.roles[stage.name] = stage
        return stage


def stage_fingerprint(kind: str, config: Mapping[str, Any], parents: Mapping[str, str], content_hash: str) -> str:
    """Returns the digest of everything that can change a stage's result.

    Args:
        kind: train, label or evaluate.
        config: the stage's part of the recipe.
        parents: role -> fingerprint of each artifact that it reads; of a stage that labels online, of its label stage.
        content_hash: identity of the dataset.
    """
    version = STAGE_VERSION[kind]
    identity = {"kind": kind, "version": version, "config": config, "parents": parents, "data": content_hash}
    return digest_of(identity, default=str)


def _code_digest(name: str) -> str:
    """Returns a digest of the source file of `MODULE:FUNCTION`, so that a changed loss term is another stage.

    Raises:
        ValueError: the function cannot be imported, or its source is not a file.
    """
    try:
        function = import_named(name)
        check_call(function, name, ("output", "batch"))
    except ValueError as error:
        raise ValueError(f"loss.extra_term: {error}") from None
    try:
        return digest_of(Path(inspect.getsourcefile(function) or "").read_text())
    except (TypeError, OSError):
        raise ValueError(f"loss.extra_term {name!r}: expected a function in a Python file") from None


def input_size_of(stage: Stage) -> InputSize:
    """The size at which the model of a stage sees whole images: a train stage's, once it is trained."""
    data = stage.config["data"]
    return InputSize.read(data | {"resize": data.get("inference_resize", "fit")} if stage.kind == "train" else data)


def given(row: RowPlan) -> set[str]:
    """Fingerprints that a row's stages read and none of them makes."""
    made = {stage.fingerprint for stage in row.stages}
    return {parent for stage in row.stages for parent in stage.parents.values()} - made


@dataclass(frozen=True)
class SweepPlan:
    """All rows of a sweep, with what is shared and what the store already holds."""

    rows: tuple[RowPlan, ...]
    stored: frozenset[str]

    @cached_property
    def given(self) -> frozenset[str]:
        """Fingerprints that stages read and none of them makes: imported theta_T0s, which the store holds."""
        return frozenset(p for row in self.rows for p in given(row))

    @cached_property
    def unique(self) -> dict[str, Stage]:
        """Fingerprint -> stage, parents before children."""
        return {stage.fingerprint: stage for row in self.rows for stage in row.stages}

    @cached_property
    def users(self) -> dict[str, tuple[int, ...]]:
        """Fingerprint -> indices of the rows that need the stage."""
        users: dict[str, list[int]] = {fingerprint: [] for fingerprint in self.unique}
        for i, row in enumerate(self.rows):
            for fingerprint in {stage.fingerprint for stage in row.stages}:
                users[fingerprint].append(i)
        return {fingerprint: tuple(rows) for fingerprint, rows in users.items()}

    @property
    def to_run(self) -> list[Stage]:
        """Unique stages that the store does not hold, parents before children."""
        return [stage for fingerprint, stage in self.unique.items() if fingerprint not in self.stored]

    @cached_property
    def steps_from_scratch(self) -> int:
        """Optimiser steps if every row ran all of its stages by itself."""
        return sum(stage.steps for row in self.rows for stage in row.stages)

    @property
    def steps_unique(self) -> int:
        return sum(stage.steps for stage in self.unique.values())

    @property
    def steps_to_run(self) -> int:
        return sum(stage.steps for stage in self.to_run)


def plan_sweep(rows: Iterable[RowPlan], stored: Iterable[str]) -> SweepPlan:
    """Joins the plans of all rows; `stored`: fingerprints that the artifact store holds.

    Equal stages become one object, so that the memory of a plan grows with its unique stages.
    """
    known: dict[str, Stage] = {}
    joined = []
    for row in rows:
        stages = tuple(known.setdefault(stage.fingerprint, stage) for stage in row.stages)
        joined.append(replace(row, stages=stages, roles={r: known[s.fingerprint] for r, s in row.roles.items()}))
    return SweepPlan(tuple(joined), frozenset(known.keys() & set(stored)))
