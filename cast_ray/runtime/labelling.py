"""The labelling job (1b, 2a): a Ray Data pipeline with the teacher in an actor pool, from images to Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.placement_group import PlacementGroup

from cast_ray.recipe import PseudoConfig, Recipe, RuntimeConfig
from cast_ray.records import RECORD_SCHEMA, Category
from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.streams import (
    Images,
    Pictures,
    configure_data,
    picture_dataset,
    record_at,
    reserve,
    stream_bundle,
)
from cast_ray.stages.graph import Stage


@dataclass(frozen=True)
class LabelJob:
    """What the actors of one labelling job share; small, sent to each."""

    store: ArtifactStore
    stage: Stage
    images: Images
    broker: Any
    owner: str
    amp: str = "auto"

    @property
    def image_px(self) -> tuple[int, int]:
        height, width = self.stage.config["data"]["image_px"]
        return height, width


def label_images(job: LabelJob, runtime: RuntimeConfig) -> int:
    """Runs the stage's teacher over D_u and writes its pseudo-labels below the stage's artifact (not committed).

    Returns:
        Number of images labelled.

    Raises:
        RuntimeError: fewer rows came out than went in (nothing may be dropped silently).
    """
    labeller = {"CPU": runtime.cpus_per_labeller} | ({"GPU": 1.0} if runtime.use_gpu else {})
    with reserve([stream_bundle(runtime), *[labeller] * runtime.num_labellers]) as group:
        _run(job, runtime, group)
    written = job.store.read_table(job.stage.key, "labels", columns=["position"]).num_rows
    if written != len(job.images.unlabelled):
        raise RuntimeError(
            f"{job.stage.name}: {len(job.images.unlabelled)} images went in, {written} label rows came out"
        )
    return written


def count_labels(store: ArtifactStore, stage: Stage) -> int:
    """How many pseudo-labels a labelling job wrote for all of its images."""
    table = store.read_table(stage.key, "labels", columns=["instances.list.element.is_crowd"])
    return pc.sum(pc.list_value_length(table.column("instances"))).as_py() or 0


def nothing_found(stage: Stage, recipe: Recipe, num_images: int, categories: Sequence[Category]) -> str:
    """What to say when a teacher gave no label at all."""
    teacher, names = recipe.teacher, [c.name for c in categories]
    threshold = f"pseudo.score_threshold {recipe.pseudo.score_threshold}"
    asked = ""
    if "teacher" in stage.config:
        threshold += f" and teacher.inference.score_threshold {teacher.inference.score_threshold}"
        words = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        asked = f" It was asked for {words}: other words go into teacher.prompt.synonyms."
    return (
        f"{stage.name}: the teacher ({teacher.kind}) found nothing above {threshold} in any of {num_images} images."
        f"{asked} Lower the thresholds or train the teacher longer; pseudo.on_empty=warn goes on without labels"
    )


def _run(job: LabelJob, runtime: RuntimeConfig, group: PlacementGroup) -> None:
    configure_data(group, runtime)
    pictures = picture_dataset(job.images.records, job.images.unlabelled, job.image_px, runtime.cpus_per_read)
    labels = pictures.map_batches(
        Labeller,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=runtime.num_labellers),
        num_cpus=runtime.cpus_per_labeller,
        num_gpus=1 if runtime.use_gpu else 0,
    )
    labels.write_parquet(
        job.store.artifact(job.stage.key) + "/labels",
        mode=ray.data.SaveMode.OVERWRITE,
        ray_remote_args={"num_cpus": runtime.cpus_per_read},
    )


class Labeller:
    """An actor of the pool: holds the teacher on its device and turns images into pseudo-label records."""

    def __init__(self, job: LabelJob):
        import torch

        from cast_ray.runtime.models import load_labeller

        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = load_labeller(job.store, job.stage, "teacher", device, job.amp)
        self.categories = self.teacher.categories
        self.pseudo = PseudoConfig(**job.stage.config["pseudo"])
        self.job = job

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        from cast_ray.teachers.pseudo import pseudo_labels

        job = self.job
        batch = Pictures.of(block, job.image_px)
        found = self.teacher.predict(torch.from_numpy(batch.pixels), batch.image_hw, batch.resized_hw)
        rows = []
        for position, instances in zip(batch.positions, found):
            record = record_at(job.images.records, job.images.unlabelled[position])
            record["instances"] = [
                {
                    "category_id": self.categories[i["label"]].id,
                    "rle": i["rle"],
                    "score": i["score"],
                    "is_crowd": False,
                }
                for i in pseudo_labels(instances, self.pseudo)
            ]
            rows.append(record | {"position": position})
        job.broker.advance.remote(job.owner, len(rows))
        return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA.append(pa.field("position", pa.int64())))
