"""How many stages of a sweep can run at a time on the resources of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from cast_ray.recipe import Recipe


def stage_slots(
    recipe: Recipe,
    resources: dict[str, float],
    driver_cpus: float,
    beside_training: Sequence[dict[str, float]] = (),
) -> int:
    """How many stages can run at a time: row drivers, workers, teachers and decoding tasks must fit, or reads never
    start.

    Args:
        beside_training: what else a train stage reserves, see `validation.validation_bundles`.

    Raises:
        ValueError: not even one fits; the message gives the sum.
    """
    from cast_ray.runtime.data.resources import num_teachers, stream_bundle

    runtime = recipe.runtime
    teachers = num_teachers(runtime) if recipe.labels.mode == "online" else 0
    reads = stream_bundle(runtime)["CPU"]
    training = runtime.num_workers * (runtime.cpus_per_worker + reads) + teachers * runtime.cpus_per_labeller
    training += sum(bundle["CPU"] for bundle in beside_training)
    labelling = runtime.num_labellers * runtime.cpus_per_labeller + reads
    # Two drivers a slot: one runs, one waits for its turn (see `run_sweep`).
    per_stage = max(training, labelling) + 2 * driver_cpus
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    slots = int((cpus + 1e-9) // per_stage)
    wanted = f"{per_stage:g} CPUs"
    if runtime.use_gpu:
        gpus_for_training = runtime.num_workers + teachers + sum(b.get("GPU", 0.0) for b in beside_training)
        gpus_per_stage = max(gpus_for_training, runtime.num_labellers)
        if gpus < gpus_per_stage:
            fewer = ", or lower runtime.num_workers or runtime.num_labellers" if gpus else ""
            if any(b.get("GPU") for b in beside_training):
                fewer += ", or set runtime.validate_on_gpu=false (evaluation.every_steps asks for a GPU of its own)"
            raise ValueError(
                f"runtime.use_gpu: one stage needs {gpus_per_stage:g} GPUs, Ray has {gpus:g}: set "
                f"runtime.use_gpu=false to run on CPUs{fewer}"
            )
        slots = min(slots, int(gpus // gpus_per_stage))
        wanted += f" and {gpus_per_stage:g} GPUs"
    # Not reserved in Ray (see `budget._as_seen`), so counted here: streams beyond it would spill to disk.
    memory_mb = resources.get("object_store_memory", 0.0) / 2**20
    num_streams = runtime.num_workers + bool(beside_training)
    slots = min(slots, int(memory_mb // (num_streams * runtime.stream_memory_mb)))
    wanted += f" and {num_streams * runtime.stream_memory_mb} MB of object store"
    others = "; validation beside training needs its share (evaluation.every_steps)" if beside_training else ""
    if slots < 1:
        raise ValueError(
            f"runtime: one stage needs {wanted} (workers or labellers and their decoding tasks), Ray has {cpus:g} "
            f"CPUs, {gpus:g} GPUs and {memory_mb:.0f} MB: lower runtime.num_workers, runtime.cpus_per_worker, "
            f"runtime.reads_per_stream, runtime.cpus_per_read or runtime.stream_memory_mb{others}"
        )
    return min(slots, runtime.max_concurrent_stages) if runtime.max_concurrent_stages else slots
