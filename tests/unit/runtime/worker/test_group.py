"""A segment's worker group without Ray: which losses are tried again, and how often."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from cast_ray.recipe import build_recipe
from cast_ray.runtime.worker import group as group_module
from cast_ray.runtime.worker.group import run_segment
from cast_ray.runtime.worker.segment import Segment


class Calls:
    """Stands for the broker: notes what it is told and answers what a healthy one would."""

    def __init__(self, may_start: bool = True) -> None:
        self.names: list[str] = []
        self.answers: dict[str, Any] = {"occupy": may_start, "failure": None}

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.names.append(name)
            return self.answers.get(name)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each start of Train ends with, in turn: an error, or None where it is done."""
    outcomes: list[Any] = []

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            if (outcome := outcomes.pop(0)) is not None:
                raise ControllerError(outcome)

    @contextmanager
    def reserve(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(wait=lambda timeout_s: True)

    monkeypatch.setattr(group_module, "_trainer_class", lambda num_workers: Trainer)
    monkeypatch.setattr(group_module, "reserve", reserve)
    monkeypatch.setattr(group_module, "_find_room", lambda segment, homes: ["node"] * len(homes))
    monkeypatch.setattr(group_module.ray, "get", lambda answer: answer)
    monkeypatch.delenv(group_module.START_TIMEOUT, raising=False)
    return outcomes


def segment(broker: Calls) -> Segment:
    recipe = build_recipe("shapes", overrides={"runtime.max_failures": "2"})
    stages: Any = [SimpleNamespace(fingerprint="abc", kind="evaluate", online=None)]
    store: Any = SimpleNamespace(attempt="1", uri=lambda *_: "/tmp/none", forget_run=lambda *_: None)
    parts: Any = {"categories": (), "images": {}, "val": None, "num_val": 0, "requested": 0.0}
    return Segment(owner="row", stages=stages, recipe=recipe, store=store, broker=broker, **parts)


def test_a_worker_lost_while_its_group_starts_is_tried_again(fits: list[Any]) -> None:
    broker = Calls()
    fits += [WorkerGroupStartupFailedError(), WorkerGroupStartupTimeoutError(1), WorkerGroupStartupFailedError(), None]
    run_segment(segment(broker))
    assert fits == [] and broker.names.count("occupy") == broker.names.count("vacate") == 4


def test_it_is_not_tried_for_ever(fits: list[Any]) -> None:
    broker = Calls()
    fits += [WorkerGroupStartupFailedError()] * 4
    with pytest.raises(ControllerError):
        run_segment(segment(broker))
    assert len(fits) == 1 and broker.names[-1] == "vacate"  # the first and runtime.max_failures = 2 more


def test_another_fault_of_the_controller_is_not_tried_again(fits: list[Any]) -> None:
    fits += [RuntimeError("a bug"), None]
    with pytest.raises(ControllerError):
        run_segment(segment(Calls()))
    assert len(fits) == 1


def test_a_sweep_that_came_to_its_end_while_the_segment_waited_starts_nothing(fits: list[Any]) -> None:
    broker = Calls(may_start=False)
    fits.append(None)
    run_segment(segment(broker))
    assert len(fits) == 1 and broker.names == ["occupy", "vacate"]


def test_one_worker_needs_no_torch_in_the_driver() -> None:
    """Torch's import would stand between the command and the start of every worker group."""
    code = (
        "import sys; from cast_ray.runtime.worker import group; import cast_ray.runtime.sweep.row_driver; "
        "print(group._trainer_class(1).__name__, 'torch' in sys.modules, group._trainer_class(2).__name__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["DataParallelTrainer", "False", "TorchTrainer"]
