"""Folders that some node of a cluster does not see are refused in one line that names the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cast_ray.runtime.shared_paths import refuse_unseen

NODES = {"a": "head", "b": "worker-1", "c": "worker-2"}


def test_a_storage_of_one_machine_is_refused(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def see(node: str, paths: list[str]) -> list[str]:
        asked.extend((node, Path(path).read_text()) for path in paths)  # the probe is there while nodes are asked
        return [] if node == "a" else paths

    words = (
        r"--storage '.*' is not seen by 2 of the cluster's 3 nodes \(worker-1, worker-2\): expected a folder that all"
    )
    with pytest.raises(ValueError, match=words):
        refuse_unseen(NODES, str(tmp_path / "storage"), [], see)
    assert asked == [(node, "seen") for node in NODES]
    assert list((tmp_path / "storage").iterdir()) == []


def test_data_of_one_machine_are_refused(tmp_path: Path) -> None:
    def see(node: str, paths: list[str]) -> list[str]:
        return [path for path in paths if node == "c" and path == "/there"]

    with pytest.raises(ValueError, match=r"data.root '/there' is not seen by 1 of the cluster's 3 nodes \(worker-2\)"):
        refuse_unseen(NODES, str(tmp_path), ["/here", "/there"], see)
    refuse_unseen(NODES, str(tmp_path), ["/here"], see)


def test_many_nodes_are_not_all_named(tmp_path: Path) -> None:
    nodes = {str(i): f"n{i}" for i in range(9)}
    with pytest.raises(ValueError, match=r"9 of the cluster's 9 nodes \(n0, n1, n2, n3, n4 and 4 more\)"):
        refuse_unseen(nodes, str(tmp_path), [], lambda node, paths: paths)


@pytest.mark.parametrize(
    ("nodes", "storage", "roots"),
    [({"a": "head"}, "/nowhere/at/all", ["/there"]), (NODES, "s3://bucket/storage", ["gs://bucket/data", ""])],
)
def test_one_node_and_uris_are_not_asked(nodes: dict[str, str], storage: str, roots: list[str]) -> None:
    refuse_unseen(nodes, storage, roots, lambda node, paths: pytest.fail("asked"))
