"""A labelling job tells its user of each node that it loses, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.runtime.worker import labelling as module
from cast_ray.runtime.worker.labelling import NodeLosses


def test_each_loss_of_a_node_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    is_pending, nodes, told = False, ["a", "b"], list[tuple[str, str]]()
    monkeypatch.setattr(module, "is_broken", lambda group: is_pending)
    monkeypatch.setattr(module, "nodes_of", lambda group: list(nodes))
    broker = SimpleNamespace(note=SimpleNamespace(remote=lambda owner, text: told.append((owner, text))))
    job: Any = SimpleNamespace(broker=broker, owner="row")
    losses = NodeLosses(job, object())  # type: ignore[arg-type]
    assert not losses.look() and told == []
    is_pending = True  # no room for it yet
    assert not losses.look() and not losses.look() and len(told) == 1
    is_pending, nodes = False, ["a", "c"]
    assert not losses.look() and len(told) == 1
    nodes = ["d", "c"]  # lost, and placed again before anybody looked
    assert not losses.look() and not losses.look() and len(told) == 2
    assert {owner for owner, _ in told} == {"row"} and all("a node that labels was lost" in text for _, text in told)
