"""Whether every node of a cluster sees the folders that a sweep reads and writes; asked before any compute is spent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cast_ray.common.files import write_atomically
from cast_ray.common.paths import is_uri

ANSWER_S = 60.0
"""How long a node may take to say what it sees; a busy one starts a process first."""
MAX_NODES_NAMED = 5

See = Callable[[str, list[str]], list[str]]
"""(node id, files) -> those of the files that the node does not see."""


def check_shared_paths(storage: str, roots: Iterable[str]) -> None:
    """Refuses local folders that some node of the cluster does not see; does nothing on a cluster of one node.

    Args:
        storage: path or URI that is written to; a probe file is put there and taken away again.
        roots: paths or URIs of the datasets, which are only read.

    Raises:
        ValueError: names the first folder and the nodes that do not see it.
    """
    nodes = {node["NodeID"]: _name_of(node) for node in ray.nodes() if node["Alive"]}
    refuse_unseen(nodes, storage, roots, _ask)


def refuse_unseen(nodes: Mapping[str, str], storage: str, roots: Iterable[str], see: See) -> None:
    """See `check_shared_paths`; `nodes`: id -> name, `see`: how a node is asked."""
    if len(nodes) < 2:
        return
    probe = None
    probes = {"data.root": [root for root in dict.fromkeys(roots) if root and not is_uri(root)]}
    try:
        if not is_uri(storage):
            probe = Path(storage, f".probe-{uuid.uuid4().hex[:8]}")
            write_atomically(probe, "seen")
            probes = {"--storage": [str(probe)], **probes}
        paths = [path for found in probes.values() for path in found]
        if not paths:
            return
        missing = {node: see(node, paths) for node in nodes}
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)
    for field, wanted in probes.items():
        for path in wanted:
            if blind := [nodes[node] for node, unseen in missing.items() if path in unseen]:
                folder = storage if field == "--storage" else path
                raise ValueError(_refusal(field, folder, blind, len(nodes)))


def _refusal(field: str, folder: str, blind: list[str], num_nodes: int) -> str:
    names = ", ".join(blind[:MAX_NODES_NAMED])
    more = f" and {len(blind) - MAX_NODES_NAMED} more" if len(blind) > MAX_NODES_NAMED else ""
    return (
        f"{field} {folder!r} is not seen by {len(blind)} of the cluster's {num_nodes} nodes ({names}{more}): expected "
        "a folder that all nodes share, or a URI such as s3://BUCKET/FOLDER"
    )


def _name_of(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeName") or node.get("NodeManagerHostname") or node["NodeID"][:8])


@ray.remote(num_cpus=0, max_retries=0)
def _unseen(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


def _ask(node: str, paths: list[str]) -> list[str]:
    """What a node does not see. One that goes away meanwhile is not asked: nothing will run there."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return ray.get(_unseen.options(scheduling_strategy=strategy).remote(paths), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return []
