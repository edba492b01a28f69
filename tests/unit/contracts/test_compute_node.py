"""Machines in words, and in the documents that name them."""

from __future__ import annotations

from cast_ray.contracts.compute_node import ComputeNode, nodes_text
from cast_ray.contracts.manifest import read_manifest
from cast_ray.contracts.row_result import RowResult

A10G = {"node": "gpu_a10g", "gpu": "NVIDIA A10G", "gpu_driver": "550.54", "cpu": "AMD EPYC"}


def test_each_machine_is_named_once() -> None:
    nodes = [ComputeNode(**A10G), ComputeNode(cpu="Xeon", node="host"), ComputeNode(**A10G), ComputeNode()]
    assert nodes_text(nodes) == "NVIDIA A10G (driver 550.54) on gpu_a10g; Xeon, no GPU on host; unknown CPU, no GPU"
    assert nodes_text([]) == ""


def test_a_manifest_and_a_result_name_machines_and_those_of_earlier_builds_do_not() -> None:
    old = read_manifest('{"stage": "distill", "kind": "train", "device": "cuda:0"}', "manifest.json")
    assert old.computed_on == ()
    new = read_manifest(old.model_copy(update={"computed_on": (ComputeNode(**A10G),)}).to_json(), "manifest.json")
    assert new.computed_on == (ComputeNode(**A10G),)
    result = RowResult(table="t", row="r", seed=0, status="done", measured_on={"s/latency_ms": ComputeNode(**A10G)})
    assert RowResult.read(result.to_json(), "result.json").measured_on == {"s/latency_ms": ComputeNode(**A10G)}
