"""Ray Data datasets whose blocks are planned ahead and made by one task each.

`from_arrow` starts a task of 1 CPU for each block to learn its schema; a `Datasource` of our own starts none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import pyarrow as pa
import ray.data
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.record_tables import fetched
from cast_ray.runtime.data.resources import tasks_per_stream

Rows = tuple[int, int]
"""First row of a plan's block and the one behind its last."""


class BlockSource(Datasource):
    """A stream's dataset: blocks of a plan, each turned into one table by one task.

    Args:
        blocks: rows of the plan, in order.
        make: reference to a function, first row, row behind the last -> table, that runs in Data tasks. So its own data
            (the plan, index arrays, settings) is stored once, not per task.
    """

    def __init__(self, blocks: list[Rows], make: ray.ObjectRef):
        super().__init__()
        self.blocks = blocks
        self.make = make

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_run_block, self.make, *rows),
                BlockMetadata(num_rows=rows[1] - rows[0], size_bytes=None, exec_stats=None),
            )
            for rows in self.blocks
        ]


def block_dataset(blocks: list[Rows], make: ray.ObjectRef, runtime: RuntimeConfig) -> ray.data.Dataset:
    """The dataset of a plan, see `BlockSource`."""
    return ray.data.read_datasource(
        BlockSource(blocks, make),
        num_cpus=runtime.cpus_per_read,
        concurrency=tasks_per_stream(runtime),
        override_num_blocks=len(blocks),
    )


def warm_up_readers(runtime: RuntimeConfig) -> None:
    """Starts processes on this node that have imported what a stream's tasks need; returns at once.

    A task's process needs some seconds for torch and torchvision. Ray gives a stream's first tasks the idle processes
    of its job, so these seconds pass while the worker of the stream imports its own packages.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    for _ in range(runtime.reads_per_stream):
        _warm_up.options(scheduling_strategy=here).remote()


@ray.remote(num_cpus=0, max_retries=0)
def _warm_up() -> None:
    from cast_ray.runtime.process_settings import prepare_process

    prepare_process()


def _run_block(make: ray.ObjectRef, start: int, stop: int) -> list[pa.Table]:
    from cast_ray.runtime.data.shared_images import share_images
    from cast_ray.runtime.process_settings import prepare_process

    prepare_process()
    share_images()
    return [fetched(make)(start, stop)]


def iter_blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    # Whole Arrow blocks: slicing rows off one by one in Ray Data costs three times as much.
    return cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
