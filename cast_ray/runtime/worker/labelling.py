"""The labelling stage (1b, 2a): images in, pseudo-labels out, in blocks that survive whoever made them.

A block of images becomes one Parquet file below `<storage>/labels/<fingerprint>/`, which appears whole or not at all. A
job that was killed resumes with the blocks that are missing. When none is missing, they are joined into one file of the
stage's artifact, which is committed, and removed.

An image that cannot be read is left out of the labels, and so of the training that uses them; its file and the reason
are in the manifest (`skipped`). Above `data.max_bad_fraction` the stage fails.

Who labels: by default the workers that train (`stage_loop._label`), each of which takes the next block when it is free:
the teacher's training has just ended there, so nothing has to start. With `runtime.num_labellers` a separate job runs a
Ray Data pipeline with the teacher in a pool of actors, for more devices than train. The blocks, and so the labels, are
the same.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import ray
import ray.data
from ray.util.placement_group import PlacementGroup

from cast_ray.common.repeated import repeated
from cast_ray.runtime.data.block_source import Rows
from cast_ray.runtime.data.pictures import Pictures, picture_dataset
from cast_ray.runtime.data.resources import configure_data, labelling_bundles, labelling_selectors
from cast_ray.runtime.placement import is_broken, nodes_of, reserve
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.segment import SweepStopped

LOOK_S = 2.0
"""How often a job looks whether all its nodes are there."""


def label_images(job: LabelJob, holder: str = "") -> dict[str, Any]:
    """Runs a labelling stage as a separate job; see `LabelJob.facts` and `join` for what it returns and raises.

    Args:
        holder: in whose name its room is reserved, see `placement.give_back`.

    Raises:
        SweepStopped: while it waited for room, the sweep came to an end at which nothing more may start.
    """
    runtime, began = job.recipe.runtime, time.monotonic()
    job.start()
    blocks = job.missing(job.blocks)
    if blocks:
        say = partial(job.broker.wait_for_room.remote, job.owner)
        selectors = labelling_selectors(runtime)
        with reserve(labelling_bundles(runtime), selectors=selectors, say=say, holder=holder) as group:
            if not ray.get(job.broker.occupy.remote(job.owner, runtime.num_labellers)):
                raise SweepStopped
            _run(job, group, blocks)
    facts, added = ray.get(_join.remote(job))
    job.store.note_added(job.stage, added)
    return job.facts(blocks, began) | facts


# Rows in the making are kept out of the driver's memory; its trial's placement group holds nothing but the driver.
@ray.remote(num_cpus=0.01, scheduling_strategy="DEFAULT")
def _join(job: LabelJob) -> tuple[dict[str, Any], frozenset[str]]:
    """See `LabelJob.join`; also the names of the files that it has added to the artifact."""
    return job.join(), job.store.added(job.stage)


def _run(job: LabelJob, group: PlacementGroup, blocks: list[Rows]) -> None:
    runtime, images = job.recipe.runtime, job.images
    configure_data(group, runtime, -1)
    pictures = picture_dataset(images.records, images.unlabelled, job.input_size, runtime, blocks, skip_bad=True)
    labelled = pictures.map_batches(
        _Labeller,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=runtime.num_labellers),
        num_cpus=runtime.cpus_per_labeller,
        num_gpus=1 if runtime.use_gpu else 0,
    )
    with repeated(NodeLosses(job, group).look, LOOK_S):
        for _ in labelled.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass


class NodeLosses:
    """Tells the user when a node of a labelling job is lost. Ray places its bundles and starts its actors again, where
    there is room or as soon as there is, and repeats the blocks that no process has written."""

    def __init__(self, job: LabelJob, group: PlacementGroup):
        self.job, self.group = job, group
        self.nodes, self.is_told = nodes_of(group), False

    def look(self) -> bool:
        """Says so once for each loss; False: the next one is to be told as well."""
        is_pending = is_broken(self.group)
        nodes = self.nodes if is_pending else nodes_of(self.group)
        if (is_pending or nodes != self.nodes) and not self.is_told:
            note = "a node that labels was lost; its images are labelled on another one, as soon as there is room"
            self.job.broker.note.remote(self.job.owner, note)
        self.nodes, self.is_told = nodes, is_pending
        return False


class _Labeller:
    """An actor of the pool: holds the teacher on its device, writes each block's labels and passes on what it wrote."""

    def __init__(self, job: LabelJob):
        from cast_ray.engine.world import pick_device
        from cast_ray.runtime.process_settings import prepare_process
        from cast_ray.runtime.this_node import this_node
        from cast_ray.runtime.worker.labeller import PseudoLabeller

        prepare_process()
        device = pick_device("auto")
        self.labeller = PseudoLabeller(job.store, job.stage, device)
        self.job = job
        process = ray.get_runtime_context().get_actor_id()
        ray.get(job.broker.computes_on.remote(job.owner, process, this_node(device)))

    def __call__(self, block: pa.Table) -> pa.Table:
        pictures = Pictures.of(block)
        self.job.write(pictures, self.labeller.label(pictures))
        return block.select(["position"])
