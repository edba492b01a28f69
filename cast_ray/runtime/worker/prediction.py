"""Large folders of images through a model: a Ray Data pipeline with the model in an actor pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.data.block_source import block_dataset
from cast_ray.runtime.data.resources import configure_data, stream_bundle
from cast_ray.runtime.placement import reserve
from cast_ray.runtime.ray_internals import has_autoscaler

BATCHES_PER_TASK = 4


def map_files(
    make_worker: Callable[[], Callable[[list[str]], list[dict[str, Any]]]],
    paths: Sequence[str],
    *,
    batch: int,
    num_workers: int,
    cpus_per_worker: float = 1.0,
    address: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of every file, in the order of the paths, streamed to the caller.

    Args:
        make_worker: builds what turns paths into as many rows (plain values and bytes); called once in each actor.
        paths: paths of the images, readable from every node.
        batch: files that a worker is given at a time.
        num_workers: actors; each takes a GPU where the cluster has any.
        cpus_per_worker: CPUs of each actor, which also reads and draws.
        address: address of the cluster, as in `runtime.cluster.connect`.

    Raises:
        ValueError: more workers than the cluster can hold, and there is no autoscaler to make it larger.
    """
    cluster = connect(address)
    resources = cluster.resources
    on_gpu = resources.get("GPU", 0) >= 1
    room = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 0) / cpus_per_worker)
    if num_workers > room and (cluster.is_local or not has_autoscaler()):
        raise ValueError(f"--workers {num_workers}: this Ray has room for {room} ({'GPUs' if on_gpu else 'CPUs'})")
    runtime = RuntimeConfig()
    worker = {"CPU": cpus_per_worker} | ({"GPU": 1.0} if on_gpu else {})
    step = batch * BATCHES_PER_TASK
    blocks = [(start, min(start + step, len(paths))) for start in range(0, len(paths), step)]
    try:
        with reserve([stream_bundle(runtime), *[worker] * num_workers]) as group:
            configure_data(group, runtime, -1)
            files = block_dataset(blocks, ray.put(partial(_path_table, paths=pa.array(paths))), runtime)
            rows = files.map_batches(
                _Actor,
                fn_constructor_args=(make_worker,),
                batch_size=batch,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=num_workers),
                num_cpus=cpus_per_worker,
                num_gpus=1 if on_gpu else 0,
            )
            tables = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
            for table in cast(Iterator[pa.Table], tables):
                yield from table.to_pylist()
    finally:
        ray.shutdown()


def _path_table(start: int, stop: int, *, paths: pa.Array) -> pa.Table:
    return pa.table({"path": paths[start:stop]})


class _Actor:
    """Holds the model and hands batches of paths to it."""

    def __init__(self, make_worker: Callable[[], Callable[[list[str]], list[dict[str, Any]]]]):
        self.work = make_worker()

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.work(block.column("path").to_pylist()))
