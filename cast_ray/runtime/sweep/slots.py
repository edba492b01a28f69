"""How many stages of a sweep may run at a time.

On a Ray of this command's own, that is what its cores hold. On a cluster it is what the rows need: stages that find no
room wait with a pending placement group, which is what makes an autoscaler start nodes, and what is up in the first
second says nothing of what will be. A stage is refused at the start only where nothing starts nodes and no node that is
up holds one of its bundles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cast_ray.recipe import Recipe, RuntimeConfig
from cast_ray.runtime.cluster import Cluster

STORE = "object_store_memory"
MAX_STAGES = 32
"""Stages that run at a time on a cluster if the user has not said how many. Each of them has a driver process, and as
many more rows that wait for their turn have one too."""


def slots_of(recipes: Sequence[Recipe], cluster: Cluster, driver_cpus: float, num_rows: int) -> int:
    """How many stages of any of these recipes may run at a time.

    Args:
        num_rows: rows that are to run; a row runs one stage at a time.

    Raises:
        ValueError: a stage of one of them can never run on this cluster.
    """
    from cast_ray.runtime.worker.validation import validation_bundles

    alike = {(r.runtime, r.labels.mode, r.evaluation.every_steps): r for r in recipes}
    for recipe in alike.values():
        check_elastic(recipe.runtime, num_rows)
        check_labels(recipe, cluster)
    if cluster.is_local:
        return min(stage_slots(r, cluster.resources, driver_cpus, validation_bundles(r)) for r in alike.values())
    for recipe in alike.values():
        check_nodes(recipe, cluster, validation_bundles(recipe))
    asked = [r.runtime.max_concurrent_stages for r in alike.values() if r.runtime.max_concurrent_stages]
    return max(1, min(num_rows, *asked) if asked else min(num_rows, MAX_STAGES))


def check_elastic(runtime: RuntimeConfig, num_rows: int) -> None:
    """Raises ValueError where several rows are to run and one may take all the room there is."""
    if runtime.is_elastic and num_rows > 1:
        counts = f"{runtime.min_workers}:{runtime.num_workers}"
        raise ValueError(
            f"--workers-per-trial {counts} (runtime.min_workers={runtime.min_workers}): {num_rows} rows are to run, "
            "and the first would take all room: expected one row and one seed (--rows, --seeds), or a number"
        )


def check_labels(recipe: Recipe, cluster: Cluster) -> None:
    """Compares the label selectors of a recipe with the nodes of a cluster that does not grow.

    Raises:
        ValueError: one of them selects no node, and there is no autoscaler that may start one.
    """
    from cast_ray.recipe.runtime import parse_selector
    from cast_ray.runtime.placement import NODE_LABEL, is_selected
    from cast_ray.runtime.ray_internals import has_autoscaler

    for name in ("worker_selector", "labeller_selector"):
        selector = parse_selector(getattr(recipe.runtime, name))
        if not selector or any(is_selected(labels, selector) for labels in cluster.labels):
            continue
        if not cluster.is_local and has_autoscaler():
            continue
        has = dict.fromkeys(f"{k}={v}" for labels in cluster.labels for k, v in labels.items() if k != NODE_LABEL)
        raise ValueError(
            f"runtime.{name}={getattr(recipe.runtime, name)}: no node of this cluster has such labels, and nothing "
            f"starts another; its nodes have {', '.join(has) or 'no labels'}"
        )


def check_nodes(recipe: Recipe, cluster: Cluster, beside_training: Sequence[dict[str, float]]) -> None:
    """Compares every bundle that a stage may reserve with every node of a cluster that does not grow and whose labels
    are those that the recipe asks for.

    Args:
        beside_training: what else a train stage reserves, see `validation.validation_bundles`.

    Raises:
        ValueError: no node holds one of them, and there is no autoscaler that may start one that does.
    """
    from cast_ray.recipe.runtime import parse_selector
    from cast_ray.runtime.placement import bundles_in_words, fits, is_selected, selectors_in_words
    from cast_ray.runtime.ray_internals import has_autoscaler

    labels_of = cluster.labels or ({},) * len(cluster.nodes)
    for part, bundle, settings, text in _parts(recipe, beside_training):
        selector = parse_selector(text)
        chosen = [node for node, labels in zip(cluster.nodes, labels_of) if is_selected(labels, selector)]
        if any(fits(bundle, node) for node in chosen) or has_autoscaler():
            continue
        nodes = [{name: node.get(name, 0.0) for name in bundle} for node in chosen]
        wanted, offered = (bundles_in_words(list(map(_in_mb, bundles))) for bundles in ([bundle], nodes))
        raise ValueError(
            f"runtime: {part} needs a node with {wanted}; the nodes of this cluster{selectors_in_words([selector])} "
            f"have {offered}, and it has no autoscaler that could start another: {settings}"
        )


def _parts(recipe: Recipe, beside: Sequence[dict[str, float]]) -> Iterator[tuple[str, dict[str, float], str, str]]:
    """What has to lie on one node, in words; its resources; how to make it smaller; which labels its node must have."""
    from cast_ray.runtime.data.resources import labeller_bundle, segment_bundles, stream_bundle

    runtime = recipe.runtime
    # No placement group reserves it (see `data/resources.py`), but a node without it spills the stream to disk.
    memory = {STORE: runtime.stream_memory_mb * 2.0**20}
    on_cpu = "set runtime.use_gpu=false to run on CPUs, or " if runtime.use_gpu else ""
    stream = "lower runtime.reads_per_stream, runtime.cpus_per_read or runtime.stream_memory_mb"
    worker, *others = segment_bundles(runtime, beside, [])
    yield (
        "a worker with its stream",
        worker | memory,
        f"{on_cpu}{stream}, or runtime.cpus_per_worker",
        runtime.worker_selector,
    )
    for bundle in others:
        on_gpu = "set runtime.validate_on_gpu=false, or " if bundle.get("GPU") else ""
        yield (
            "validation beside training",
            bundle | memory,
            f"{on_gpu}unset evaluation.every_steps",
            runtime.worker_selector,
        )
    if recipe.labels.mode == "online" or runtime.num_labellers:
        yield (
            "a labeller",
            labeller_bundle(runtime),
            f"{on_cpu}lower runtime.cpus_per_labeller",
            runtime.labeller_selector,
        )
    if runtime.num_labellers:
        yield "a labelling job's stream", stream_bundle(runtime) | memory, stream, runtime.labeller_selector


def _in_mb(bundle: dict[str, float]) -> dict[str, float]:
    """A bundle for people to read."""
    return {"object store MB" if k == STORE else k: v / 2**20 // 1 if k == STORE else v for k, v in bundle.items()}


def stage_slots(
    recipe: Recipe,
    resources: dict[str, float],
    driver_cpus: float,
    beside_training: Sequence[dict[str, float]] = (),
) -> int:
    """How many stages a local Ray can run at a time.

    Row drivers, workers, teachers and decoding tasks must fit, or reads never start.

    Args:
        beside_training: what else a train stage reserves, see `validation.validation_bundles`.

    Raises:
        ValueError: not even one fits; the message gives the sum.
    """
    from cast_ray.runtime.data.resources import num_teachers, stream_bundle

    runtime = recipe.runtime
    teachers = num_teachers(runtime) if recipe.labels.mode == "online" else 0
    reads = stream_bundle(runtime)["CPU"]
    training = runtime.least_workers * (runtime.cpus_per_worker + reads) + teachers * runtime.cpus_per_labeller
    training += sum(bundle["CPU"] for bundle in beside_training)
    labelling = runtime.num_labellers * runtime.cpus_per_labeller + reads
    # Two drivers a slot: one runs, one waits for its turn (see `run_sweep`).
    per_stage = max(training, labelling) + 2 * driver_cpus
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    slots = int((cpus + 1e-9) // per_stage)
    wanted = f"{per_stage:g} CPUs"
    if runtime.use_gpu:
        gpus_for_training = runtime.least_workers + teachers + sum(b.get("GPU", 0.0) for b in beside_training)
        gpus_per_stage = max(gpus_for_training, runtime.num_labellers)
        if gpus < gpus_per_stage:
            fewer = ", or lower runtime.num_workers or runtime.num_labellers" if gpus else ""
            if any(b.get("GPU") for b in beside_training):
                fewer += ", or set runtime.validate_on_gpu=false (evaluation.every_steps asks for one more GPU)"
            raise ValueError(
                f"runtime.use_gpu: one stage needs {gpus_per_stage:g} GPUs, Ray has {gpus:g}: set "
                f"runtime.use_gpu=false to run on CPUs{fewer}"
            )
        slots = min(slots, int(gpus // gpus_per_stage))
        wanted += f" and {gpus_per_stage:g} GPUs"
    # Not reserved in Ray (see `data/resources.py`), so counted here: streams beyond it would spill to disk.
    memory_mb = resources.get(STORE, 0.0) / 2**20
    num_streams = runtime.least_workers + bool(beside_training)
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
