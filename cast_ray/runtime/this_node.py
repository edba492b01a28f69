"""What this machine is, for manifests and results."""

from __future__ import annotations

import platform
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from cast_ray.contracts.compute_node import ComputeNode

if TYPE_CHECKING:
    import torch

CPU_INFO = Path("/proc/cpuinfo")
DRIVER_INFO = Path("/proc/driver/nvidia/version")
"""Written by NVIDIA's kernel module, in containers too; its first line ends with version and date."""


def this_node(device: torch.device) -> ComputeNode:
    """Describes the machine of this process of Ray, which computes on `device`."""
    import ray  # which planning, for which `cpu_model` is enough, does without

    from cast_ray.runtime.ray_internals import NODE_GROUP_LABEL

    gpu = driver = None
    if device.type == "cuda":
        import torch

        gpu, driver = torch.cuda.get_device_name(device), gpu_driver()
    labels = ray.get_runtime_context().get_node_labels()
    return ComputeNode(
        node=str(labels.get(NODE_GROUP_LABEL) or socket.gethostname()), gpu=gpu, gpu_driver=driver, cpu=cpu_model()
    )


def gpu_driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none, or it does not say."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER_INFO.read_text().partition("\n")[0])
    except OSError:
        return None
    return found.group() if found else None


def cpu_model() -> str:
    """Model of this machine's CPU, or its architecture where Linux does not say."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
