"""What all processes that run one labelling stage share: its blocks, the files they become, and joining these into one.

A block of images becomes one Parquet file below `<storage>/labels/<fingerprint>/`, which appears whole or not at all. A
job that was killed resumes with the blocks that are missing. When none is missing, they are joined into one file of the
stage's artifact, which is committed, and removed.

An image that cannot be read is left out of the labels, and so of the training that uses them; its file and the reason
are in the manifest (`skipped`). Above `data.max_bad_fraction` the stage fails.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cast_ray.contracts.instance import RecordLabel
from cast_ray.contracts.records import INSTANCE_TYPE, RECORD_SCHEMA, Category, class_names, pieces_of, take_rows
from cast_ray.plan.graph import Stage, input_size_of
from cast_ray.plan.stage_parts import LabelPart
from cast_ray.recipe import InputSize, Recipe
from cast_ray.runtime.data.block_source import Rows
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import Pictures, images_per_task
from cast_ray.runtime.data.record_tables import record_at, table_of
from cast_ray.runtime.store.artifact_files import LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore

LABEL_TYPE = pa.struct(
    [
        *INSTANCE_TYPE,
        pa.field("visible_share", pa.float32()),  # of the teacher's mask, after painting
        pa.field("num_suppressed", pa.int32()),  # predictions of its class that this one suppressed before painting
        pa.field("class_probs", pa.list_(pa.float32())),  # of soft targets (`loss.soft_targets`), else null
        pa.field("mask_probs", pa.binary()),  # of the matched query, see `soft_targets.mask_probabilities`
    ]
)
LABEL_SCHEMA = RECORD_SCHEMA.set(
    RECORD_SCHEMA.get_field_index("instances"), pa.field("instances", pa.list_(LABEL_TYPE))
).append(pa.field("position", pa.int64()))
"""One row an image that was labelled, in the order of D_u."""
BLOCK_SCHEMA = LABEL_SCHEMA.append(pa.field("error", pa.string()))
BLOCKS_JOINED_AT_A_TIME = 64
ROW_GROUP_BYTES = 128 << 20
"""Size of a row group of the joined labels, which readers hold whole."""


@dataclass(frozen=True)
class LabelJob:
    """What all processes that run one labelling stage share; it is small, and each is sent a copy."""

    store: ArtifactStore
    stage: Stage
    images: Images
    broker: Any
    owner: str
    recipe: Recipe

    @property
    def input_size(self) -> InputSize:
        """The size at which the teacher sees whole images."""
        return input_size_of(self.stage)

    @property
    def folder(self) -> str:
        """Folder of the blocks, below the storage path."""
        return f"labels/{self.stage.fingerprint}"

    @property
    def blocks(self) -> list[Rows]:
        """All of D_u in blocks of whole forward passes."""
        batch = LabelPart.of(self.stage).batch
        size = batch * max(1, images_per_task(self.input_size) // batch)
        count = len(self.images.unlabelled)
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def missing(self, blocks: Iterable[Rows]) -> list[Rows]:
        """Returns the blocks that no process has written yet."""
        found = set(self.store.list_names(self.folder))
        return [rows for rows in blocks if _file_name(rows) not in found]

    def start(self) -> None:
        """Shows the stage as running, with what an earlier job has done."""
        missing = sum(stop - start for start, stop in self.missing(self.blocks))
        total = len(self.images.unlabelled)
        facts = {"stage": self.stage.name, "fingerprint": self.stage.fingerprint, "unit": "image"}
        self.broker.begin.remote(self.owner, facts | {"step": total - missing, "steps": total})

    def write(self, pictures: Pictures, labels: list[list[RecordLabel]]) -> None:
        """Writes one block's labels, in the order of its images, and tells the broker how many images it has."""
        num_images = self.write_block(pictures, labels)
        self.broker.advance.remote(self.owner, num_images, sum(map(len, labels)))

    def write_block(self, pictures: Pictures, labels: list[list[RecordLabel]]) -> int:
        """Writes one block's labels, in the order of its images; returns how many images it has."""
        rows: list[dict[str, Any]] = []
        for position, instances in zip(pictures.positions, labels):
            record = record_at(self.images.records, self.images.unlabelled[position])
            rows.append(record | {"instances": instances, "position": position, "error": None})
        for position, reason in pictures.bad:
            record = record_at(self.images.records, self.images.unlabelled[position])
            rows.append(record | {"instances": [], "position": position, "error": reason})
        rows.sort(key=lambda row: row["position"])
        file = io.BytesIO()
        pa.parquet.write_table(pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA), file)
        block = (rows[0]["position"], rows[-1]["position"] + 1)
        self.store.write_bytes(f"{self.folder}/{_file_name(block)}", file.getvalue())
        return len(rows)

    def facts(self, blocks: list[Rows], began: float) -> dict[str, Any]:
        """Facts of a run that labelled these blocks since `began` (time.monotonic()) and found the others done."""
        seconds = time.monotonic() - began
        labelled = sum(stop - start for start, stop in blocks)
        found = len(self.images.unlabelled) - labelled
        return {"seconds": seconds, "images_per_s": labelled / max(seconds, 1e-9), "num_found": found}

    def join(self) -> dict[str, Any]:
        """Makes the artifact's one file of all blocks (not committed), a few in memory at a time.

        Returns:
            num_images: labelled ones; num_pseudo_labels: instances on them; skipped: position, file and reason of the
            other images; class_thresholds: class -> least score, where each class has its own.

        Raises:
            RuntimeError: an image has no row (nothing may be dropped silently).
            ValueError: too large a share could not be read; the message names the first. No image got a label, unless
                `pseudo.on_empty` is warn.
        """
        skipped: list[dict[str, Any]] = []
        num_images = num_labels = 0
        is_balanced = LabelPart.of(self.stage).pseudo.class_thresholds == "balanced"
        thresholds = self._balanced_thresholds() if is_balanced else None
        with (
            self.store.open_to_add(self.stage, LABELS) as file,
            pa.parquet.ParquetWriter(file, LABEL_SCHEMA) as writer,
        ):
            for table in self._written():
                bad = table.filter(pa.compute.is_valid(table["error"]))
                skipped += bad.select(["position", "uri", "error"]).to_pylist()
                labelled = table.filter(pa.compute.is_null(table["error"])).drop_columns("error")
                if thresholds is not None:
                    labelled = self._painted(labelled, thresholds)
                for piece in pieces_of(labelled, ROW_GROUP_BYTES):  # what is read at once
                    writer.write_table(piece)
                num_images += labelled.num_rows
                num_labels += pa.compute.sum(pa.compute.list_value_length(labelled["instances"])).as_py() or 0
        wanted = len(self.images.unlabelled)
        if num_images + len(skipped) != wanted:
            raise RuntimeError(
                f"{self.stage.name}: {wanted} images went in, {num_images} labelled and {len(skipped)} skipped came out"
            )
        limit = self.recipe.data.max_bad_fraction
        if len(skipped) > limit * wanted:
            raise ValueError(
                f"{self.stage.name}: {len(skipped)} of {wanted} images could not be read, above "
                f"data.max_bad_fraction={limit}: {'; '.join(row['error'] for row in skipped[:3])}"
            )
        if num_labels == 0 and self.recipe.pseudo.on_empty == "stop":
            raise ValueError(nothing_found(self.stage, self.recipe, self.images.categories, f"any of {num_images}"))
        facts: dict[str, Any] = {"num_images": num_images, "num_pseudo_labels": num_labels, "skipped": skipped}
        if thresholds is not None:
            names = dict(zip((c.id for c in self.images.categories), class_names(self.images.categories)))
            facts["class_thresholds"] = {names[category]: least for category, least in sorted(thresholds.items())}
        return facts

    def _balanced_thresholds(self) -> dict[int, float]:
        """Category -> least score of a label, from the predictions in all blocks and the truth of D_l."""
        from cast_ray.teachers.class_thresholds import balanced_thresholds

        scores: dict[int, list[np.ndarray]] = {}
        for table in self._written():
            instances = pa.compute.list_flatten(table["instances"])
            category, score = (pa.compute.struct_field(instances, n).to_numpy() for n in ("category_id", "score"))
            for found in np.unique(category):
                scores.setdefault(int(found), []).append(score[category == found])
        truth = take_rows(table_of(self.images.records).select(["instances"]), self.images.labelled)
        objects = pa.compute.list_flatten(truth.column("instances"))
        objects = objects.filter(pa.compute.invert(pa.compute.struct_field(objects, "is_crowd")))
        counted = pa.compute.value_counts(pa.compute.struct_field(objects, "category_id")).to_pylist()
        return balanced_thresholds(
            {category: np.concatenate(parts) for category, parts in scores.items()},
            {entry["values"]: entry["counts"] for entry in counted},
            len(self.images.labelled),
            len(self.images.unlabelled),
        )

    def _painted(self, table: pa.Table, thresholds: dict[int, float]) -> pa.Table:
        """Makes labels of predictions: those that reach the threshold of their class, painted image by image."""
        from cast_ray.teachers.pseudo_labels import paint

        config, rows = LabelPart.of(self.stage).pseudo, table.to_pylist()
        for row in rows:
            size = [row["height"], row["width"]]
            sure = [i | {"size": size} for i in row["instances"] if i["score"] >= thresholds[i["category_id"]]]
            row["instances"] = paint(sure, config)
        return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)

    def _written(self) -> Iterator[pa.Table]:
        names = [_file_name(rows) for rows in self.blocks]
        for start in range(0, len(names), BLOCKS_JOINED_AT_A_TIME):
            paths = [f"{self.folder}/{name}" for name in names[start : start + BLOCKS_JOINED_AT_A_TIME]]
            yield pa.concat_tables(self.store.read_tables(paths))

    def forget_blocks(self) -> None:
        """Removes the blocks of a committed stage: its artifact has replaced them."""
        self.store.delete_folder(self.folder)


def nothing_found(stage: Stage, recipe: Recipe, categories: Sequence[Category], which: str) -> str:
    """What to say when a teacher gave no label at all in `which` images."""
    teacher = recipe.teacher
    threshold = f"pseudo.score_threshold {recipe.pseudo.score_threshold}"
    asked = ""
    if LabelPart.of(stage).teacher_settings is not None:
        threshold += f" and teacher.inference.score_threshold {teacher.inference.score_threshold}"
        names = class_names(categories)
        words = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        asked = f" It was asked for {words}: other words go into teacher.prompt.synonyms."
    return (
        f"{stage.name}: the teacher ({teacher.kind}) found nothing above {threshold} in {which} images.{asked} Lower "
        "the thresholds or train the teacher longer, or set pseudo.on_empty=warn to continue without labels"
    )


def _file_name(rows: Rows) -> str:
    return f"{rows[0]:08d}-{rows[1]:08d}.parquet"
