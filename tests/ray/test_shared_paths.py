"""On a real cluster of two nodes, folders that the nodes do not see are found before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cast_ray.runtime.shared_paths import check_shared_paths

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    memory = 128 << 20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    ray.init(cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_every_node_is_asked(two_nodes: None, tmp_path: Path) -> None:
    check_shared_paths(str(tmp_path / "storage"), [str(tmp_path), "s3://bucket/data", ""])
    assert list((tmp_path / "storage").iterdir()) == []
    # A folder that this process alone sees, as on a cluster of machines.
    own = f"/proc/self/task/{os.getpid()}"
    assert Path(own).is_dir()
    with pytest.raises(ValueError, match=r"data.root ./proc/self/.*. is not seen by 2 of the cluster's 2 nodes"):
        check_shared_paths(str(tmp_path / "storage"), [own])
