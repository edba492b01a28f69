"""What a machine says of itself for manifests: its type, GPU, driver and CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.runtime import this_node as module
from cast_ray.runtime.cluster import hardware
from cast_ray.runtime.this_node import cpu_model, gpu_driver, this_node

DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  12.2.0\n": (
        "550.54.15"
    ),
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build  (root@b)  \n": "570.86",
    "NVRM version: unknown\nGCC version:  gcc 12.2.0 (Debian 122.2.0-14)\n": None,
}


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The labels of this node, as Ray would give them."""
    found: dict[str, str] = {}
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_labels=lambda: found))
    monkeypatch.setattr(module.socket, "gethostname", lambda: "host-7")
    return found


@pytest.mark.parametrize(("content", "version"), list(DRIVERS.items()), ids=["module", "open module", "unknown"])
def test_the_version_of_the_driver(
    content: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "version"
    monkeypatch.setattr(module, "DRIVER_INFO", path)
    assert gpu_driver() is None  # no such file: no GPU
    path.write_text(content)
    assert gpu_driver() == version


def test_the_type_of_a_node_is_its_label_or_its_host_name(labels: dict[str, str]) -> None:
    on_cpu = this_node(torch.device("cpu"))
    assert on_cpu == ComputeNode(node="host-7", gpu=None, gpu_driver=None, cpu=cpu_model())
    labels["ray.io/node-group"] = "drivers"
    assert this_node(torch.device("cpu")).node == "drivers"


def test_a_gpu_is_named_with_its_driver(
    labels: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(next(iter(DRIVERS)))
    monkeypatch.setattr(module, "DRIVER_INFO", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    node = this_node(torch.device("cuda:0"))
    assert (node.gpu, node.gpu_driver) == ("GPU 0", "550.54.15")
    assert node.text == "GPU 0 (driver 550.54.15) on host-7"


def test_cpu_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_model()  # the architecture
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: other\n")
    assert cpu_model() == hardware().cpu == "A CPU @ 2 GHz"
