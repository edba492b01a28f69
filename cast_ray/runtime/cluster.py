"""Connecting to Ray: an existing cluster where there is one, else a local one sized for this machine."""

from __future__ import annotations

import logging
import os
import platform
from typing import Any

from cast_ray.recipe import RuntimeConfig

# One machine, few stages of a minute each: starting and stopping worker groups is what costs. These settings bring one
# from 17 s to 12 s on two cores; each gives up a feature that matters on a cluster only (see the README, operations).
LOCAL_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "OMP_NUM_THREADS": "1",
}
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def connect(address: str | None, num_cpus: int | None = None) -> str:
    """Starts or joins Ray; returns one line for the user: where it runs and where the dashboard is.

    Args:
        address: "local" for a Ray of this command alone; None: the cluster of RAY_ADDRESS (set in jobs), else local.
        num_cpus: logical CPUs of a local Ray; None: the machine's.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    local = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
    if local:
        for name, value in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)
    import ray

    if local:
        context = ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="cast_ray",
        )
    else:
        context = ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR, namespace="cast_ray")
    dashboard = f", dashboard http://{context.dashboard_url}" if context.dashboard_url else ""
    resources = ray.cluster_resources()
    size = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return f"Ray {ray.__version__} {'started here' if local else 'cluster'}: {size}{dashboard}"


def stage_slots(runtime: RuntimeConfig, resources: dict[str, float], num_drivers: int, driver_cpus: float) -> int:
    """How many stages can run at a time: drivers + workers + decoding tasks must fit, or reads never start.

    Raises:
        ValueError: not even one fits; the message gives the sum.
    """
    from cast_ray.runtime.streams import stream_bundle

    reads = stream_bundle(runtime.cpus_per_read)["CPU"]
    workers = runtime.num_workers * (runtime.cpus_per_worker + reads)
    labelling = runtime.num_labellers * runtime.cpus_per_labeller + reads
    per_stage = max(workers, labelling)
    free = resources.get("CPU", 0.0) - num_drivers * driver_cpus
    slots = int((free + 1e-9) // per_stage)
    wanted = f"{per_stage:g} CPUs"
    if runtime.use_gpu:
        gpus = max(runtime.num_workers, runtime.num_labellers)
        slots = min(slots, int(resources.get("GPU", 0.0) // gpus))
        wanted += f" and {gpus} GPUs"
    if slots < 1:
        have = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        raise ValueError(
            f"runtime: one stage needs {wanted} (workers, labellers and their decoding tasks), Ray has {have} minus "
            f"{num_drivers * driver_cpus:g} CPUs for {num_drivers} row drivers: lower runtime.num_workers, "
            "runtime.cpus_per_worker or runtime.cpus_per_read"
        )
    return min(slots, runtime.max_concurrent_stages) if runtime.max_concurrent_stages else slots


def hardware() -> dict[str, Any]:
    """This machine, for the result: CPU model, cores, memory and GPU name."""
    cpu = platform.processor() or platform.machine()
    memory_gb = 0.0
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        pass
    return {"cpu": cpu, "num_cpus": os.cpu_count() or 1, "gpu": None, "memory_gb": round(memory_gb, 1)}
