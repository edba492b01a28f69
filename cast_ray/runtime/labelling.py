"""Labelling (1b, 2a), from images to Parquet: in a row's own workers, or as a job with an actor pool of its own."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet
import ray
import ray.data
from ray.util.placement_group import PlacementGroup

from cast_ray.recipe import PseudoConfig, RuntimeConfig
from cast_ray.records import RECORD_SCHEMA
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
from cast_ray.stages.graph import Stage, artifact_key

if TYPE_CHECKING:
    import torch

    from cast_ray.engine.world import World
    from cast_ray.runtime.workers import Segment

ROWS_PER_FILE = 4096
POSITION = pa.field("position", pa.int64())
"""Row of D_u that a label record belongs to."""


@dataclass(frozen=True)
class LabelJob:
    """What the actors of one labelling job share; small, sent to each."""

    store: ArtifactStore
    stage: Stage
    images: Images
    broker: Any
    owner: str

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


def label_stage(segment: Segment, stage: Stage, world: World) -> dict[str, Any]:
    """Labels D_u in the worker group that also trains: each worker a part, with the teacher on its own device.

    Raises:
        RuntimeError: fewer rows came out than images went in.
    """
    import torch

    images, runtime = segment.images[stage.name], segment.recipe.runtime
    mine = images.unlabelled[world.rank :: world.size]
    job = LabelJob(segment.store, stage, replace(images, unlabelled=mine), segment.broker, segment.owner)
    labeller = Labeller(job, world.device)
    total = len(images.unlabelled)
    if world.rank == 0:
        post = {"stage": stage.name, "fingerprint": stage.fingerprint, "step": 0, "steps": total, "unit": "image"}
        segment.broker.post.remote(segment.owner, post)
    began = time.monotonic()
    written, pending = 0, []
    dataset = picture_dataset(images.records, mine, job.image_px, runtime.cpus_per_read)
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        labels = labeller(cast(pa.Table, block))
        positions = pa.array(world.rank + world.size * labels.column("position").to_numpy())
        pending.append(labels.set_column(labels.column_names.index("position"), "position", positions))
        if sum(table.num_rows for table in pending) >= ROWS_PER_FILE:
            written += _write_part(job, f"{world.rank:03d}-{written:08d}", pending)
    written += _write_part(job, f"{world.rank:03d}-{written:08d}", pending)
    everywhere = int(world.all_reduce_sum(torch.tensor(float(written), device=world.device)))
    if everywhere != total:
        raise RuntimeError(f"{stage.name}: {total} images went in, {everywhere} label rows came out")
    seconds = time.monotonic() - began
    return {"seconds": seconds, "images_per_s": total / max(seconds, 1e-9), "num_images": total}


def _write_part(job: LabelJob, name: str, pending: list[pa.Table]) -> int:
    """Writes label rows as one file of the artifact; returns their number."""
    table = pa.concat_tables(pending) if pending else RECORD_SCHEMA.append(POSITION).empty_table()
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer)
    job.store.add(job.stage, f"labels/{name}.parquet", buffer.getvalue())
    pending.clear()
    return table.num_rows


class Labeller:
    """Holds the teacher on a device and turns images into pseudo-label records; an actor of the pool, or in a worker.

    Args:
        device: None: this process's GPU, if it has one.
    """

    def __init__(self, job: LabelJob, device: torch.device | None = None):
        import torch

        from cast_ray.runtime.models import load_model
        from cast_ray.teachers.expert import ExpertTeacher

        if device is None:  # in a worker the stage loop has set it
            torch.set_num_threads(1)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        segmenter, self.categories = load_model(job.store, artifact_key("train", job.stage.parents["teacher"]))
        self.teacher = ExpertTeacher(segmenter.to(device), job.image_px)
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
        return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA.append(POSITION))
