"""A worker group and its host without Ray: which losses are tried again, which segments share a group, when it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from cast_ray.recipe import build_recipe
from cast_ray.runtime.worker import group as group_module
from cast_ray.runtime.worker import group_host as host_module
from cast_ray.runtime.worker.group_host import GroupHost
from cast_ray.runtime.worker.segment import Segment, SegmentFailed

# The actor's class without its Ray wrapper: the same methods on an event loop of ours.
make_host: Any = GroupHost.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class Answered:
    """Stands for the reference to an answer of the broker."""

    def __init__(self, value: Any):
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        async def answer() -> Any:
            return self.value

        return answer().__await__()


class Calls:
    """Stands for the broker: notes what it is told and answers what a healthy one would."""

    def __init__(self, may_start: bool = True) -> None:
        self.names: list[str] = []
        self.told: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {"occupy": may_start, "failure": None}

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.names.append(name)
            self.told.append((name, *arguments))
            return Answered(self.answers.get(name))

        return SimpleNamespace(remote=remote)


class Train:
    """Stands for Ray Train, the cluster and the store.

    starts: what each start of workers ends with, in turn: an error, or None where they run what they are given.
    """

    def __init__(self) -> None:
        self.starts: list[Exception | None] = []
        self.ran: list[tuple[str, str]] = []
        """(name of Train's run, owner of the segment) of every segment that workers have run to its end."""
        self.refused: set[str] = set()
        """Owners whose stages the broker does not admit."""
        self.restarted: set[str] = set()
        """Owners whose workers are lost once, and started again, in their segment."""
        self.leaving: list[bool] = []
        """Of each start of workers, in turn, whether they leave before they have run anything; empty: none does."""
        self.stored: set[str] = set()
        self.forgotten: list[Any] = []

    def fit(self, host: Any, run: str, loop: asyncio.AbstractEventLoop) -> None:
        def call(method: Awaitable[Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(method, loop).result(60)  # type: ignore[arg-type]

        if (outcome := self.starts.pop(0)) is not None:
            raise ControllerError(outcome)
        number = 0
        while (taken := call(host.take(number, 0))) is not None:
            number, segment = taken
            if self.leaving and self.leaving.pop(0):
                call(host.leave())
                return
            if segment.owner in self.restarted:
                self.restarted.remove(segment.owner)
                number = 0
                continue
            if segment.owner in self.refused:
                return
            if segment.broker.answers["failure"]:
                return
            self.ran.append((run, segment.owner))
            call(host.finish(number))


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    train = Train()

    class Trainer:
        def __init__(self, _: Any, *, train_loop_config: dict[str, Any], run_config: Any, **__: Any) -> None:
            self.host, self.run = train_loop_config["place"]["host"], run_config.name

        def fit(self) -> None:
            train.fit(self.host, self.run, self.host.loop)

    @contextmanager
    def reserve(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(wait=lambda timeout_s: True)

    monkeypatch.setattr(group_module, "_trainer_class", lambda num_workers: Trainer)
    monkeypatch.setattr(group_module, "reserve", reserve)
    monkeypatch.setattr(group_module, "is_broken", lambda group: False)
    monkeypatch.setattr(group_module, "_find_room", lambda segment, homes, *_: ["node"] * len(homes))
    monkeypatch.setattr(group_module.ray, "get", lambda answer: answer.value)
    monkeypatch.delenv(group_module.START_TIMEOUT, raising=False)
    return train


def segment(
    broker: Calls, train: Train, owner: str = "row", settings: dict[str, str] | None = None, **stage: Any
) -> Segment:
    recipe = build_recipe("shapes", overrides={"runtime.max_failures": "2", **(settings or {})})
    stages: Any = [
        SimpleNamespace(
            **{"name": "distill", "kind": "train", "fingerprint": f"of {owner}", "key": owner, "online": None} | stage
        )
    ]
    store: Any = SimpleNamespace(
        attempt="1",
        uri=lambda *_: "/tmp/none",
        has=train.stored.__contains__,
        forget_checkpoints=lambda fingerprints, but: train.forgotten.append((fingerprints, but)),
        forget_run=train.forgotten.append,
    )
    parts: Any = {"categories": (), "images": {}, "val": None, "num_val": 0, "requested": 0.0}
    return Segment(owner=owner, sweep="run", stages=stages, recipe=recipe, store=store, broker=broker, **parts)


def play(monkeypatch: pytest.MonkeyPatch, scene: Callable[[Any], Awaitable[Any]]) -> Any:
    """Runs a scene with a host."""

    async def run() -> Any:
        host = make_host("holder")
        host.loop = asyncio.get_running_loop()
        context = SimpleNamespace(current_actor=host)
        monkeypatch.setattr(host_module.ray, "get_runtime_context", lambda: context)
        return await scene(host)

    return asyncio.run(asyncio.wait_for(run(), 60))


def run_alone(monkeypatch: pytest.MonkeyPatch, given: Segment) -> None:
    """Runs one segment, after which its group ends."""

    async def scene(host: Any) -> None:
        await host.run(given)
        await host.close()

    play(monkeypatch, scene)


def test_a_worker_lost_while_its_group_starts_is_tried_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Calls()
    train.starts += [WorkerGroupStartupFailedError(), WorkerGroupStartupTimeoutError(1)]
    train.starts += [WorkerGroupStartupFailedError(), None]
    run_alone(monkeypatch, segment(broker, train))
    assert train.starts == [] and broker.names.count("occupy") == 4
    assert broker.names.count("vacate") == 3  # the broker itself counts the time of a group that is kept
    assert [owner for _, owner in train.ran] == ["row"]


def test_an_elastic_group_takes_what_room_it_finds_and_grows(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts with one worker, looks for more room while that one runs, and starts again with two."""
    broker, free, asked = Calls(), {1}, list[tuple[int, bool]]()
    fit = train.fit

    def find_room(_: Any, homes: Any, selectors: Any, holder: str, patience_s: float | None) -> list[str] | None:
        asked.append((len(homes), patience_s is None))
        return ["node"] * len(homes) if len(homes) in free else None

    def run_until_there_is_more_room(host: Any, *arguments: Any) -> None:
        if not train.leaving:
            assert not host.group.has_more_room
        deadline = time.monotonic() + 30
        while train.leaving and not asyncio.run(host.has_more_room()) and time.monotonic() < deadline:
            time.sleep(0.01)
        free.add(2)
        fit(host, *arguments)

    monkeypatch.setattr(group_module, "_find_room", find_room)
    monkeypatch.setattr(group_module, "MORE_LOOK_S", 0.01)
    monkeypatch.setattr(train, "fit", run_until_there_is_more_room)
    train.starts, train.leaving = [None, None], [True]
    run_alone(monkeypatch, segment(broker, train, settings={"runtime.num_workers": "2", "runtime.min_workers": "1"}))
    assert asked == [(2, False), (1, True), (2, False)] and [owner for _, owner in train.ran] == ["row"]
    notes = [text for name, _, text in (call for call in broker.told if call[0] == "note")]
    assert notes == [
        "its worker group has 1 of 2 workers",
        "there is room for more workers; its worker group moves to other nodes",
        "its worker group has 2 of 2 workers",
    ]
    assert [call for call in broker.told if call[0] == "occupy"] == [("occupy", "row", 1), ("occupy", "row", 2)]


def test_it_is_not_tried_for_ever(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Calls()
    train.starts += [WorkerGroupStartupFailedError()] * 4
    with pytest.raises(ControllerError):
        run_alone(monkeypatch, segment(broker, train))
    assert len(train.starts) == 1 and broker.names[-1] == "vacate"  # the first and runtime.max_failures = 2 more


def test_another_fault_of_the_controller_is_not_tried_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train.starts += [RuntimeError("a bug"), None]
    with pytest.raises(ControllerError):
        run_alone(monkeypatch, segment(Calls(), train))
    assert len(train.starts) == 1


def test_a_sweep_that_came_to_its_end_while_the_segment_waited_starts_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Calls(may_start=False)
    train.starts.append(None)
    run_alone(monkeypatch, segment(broker, train))
    assert len(train.starts) == 1 and broker.names == ["occupy", "vacate", "failure"]


def test_a_group_serves_the_next_row_of_the_same_shape(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Calls()
    train.starts += [None]

    async def scene(host: Any) -> list[bool]:
        segments = [segment(broker, train, f"row {i}") for i in range(3)]
        kept = [await host.run(each) for each in segments]
        assert train.forgotten == [([f"of row {i}"], segments[0].run_name) for i in range(3)]
        await host.close()
        return kept

    assert play(monkeypatch, scene) == [True, True, True]
    assert train.starts == [] and [owner for _, owner in train.ran] == ["row 0", "row 1", "row 2"]
    (run,) = {run for run, _ in train.ran}  # one run of Train, named after the first
    assert train.forgotten[-1] == run
    assert [call for call in broker.told if call[0] == "occupy"] == [("occupy", f"row {i}", 1) for i in range(3)]
    assert broker.names.count("vacate") == 0


def test_another_shape_gets_a_group_of_its_own(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train.starts += [None, None, None]

    async def scene(host: Any) -> None:
        assert await host.run(segment(Calls(), train, "a"))
        assert await host.run(segment(Calls(), train, "b", {"runtime.cpus_per_worker": "1"}))
        assert len(train.starts) == 1
        # Teachers that label online belong to one segment.
        assert not await host.run(segment(Calls(), train, "c", online=SimpleNamespace()))
        assert host.group is None and train.starts == []

    monkeypatch.setattr(group_module, "start_teachers", lambda *_, **__: None)
    play(monkeypatch, scene)
    assert [owner for _, owner in train.ran] == ["a", "b", "c"] and len({run for run, _ in train.ran}) == 3


def test_a_group_that_has_lost_workers_is_not_kept(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train.starts += [None, None]
    train.restarted.add("a")

    async def scene(host: Any) -> None:
        assert not await host.run(segment(Calls(), train, "a")) and host.group is None
        assert await host.run(segment(Calls(), train, "b"))
        await host.close()

    play(monkeypatch, scene)
    assert [owner for _, owner in train.ran] == ["a", "b"] and train.starts == []


def test_a_group_whose_node_is_drained_moves_and_ends_its_segment(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Calls()
    train.starts += [None, None]
    train.leaving += [True]

    async def scene(host: Any) -> None:
        assert not await host.run(segment(broker, train))  # its workers were started twice: it is not kept

    play(monkeypatch, scene)
    assert [owner for _, owner in train.ran] == ["row"] and train.starts == []
    assert broker.names.count("note") == 1 and broker.names.count("vacate") == 2


@pytest.mark.parametrize("ends", ["with its workers", "with an error"])
def test_a_group_moves_when_another_node_of_its_room_is_lost(
    ends: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of its teachers or its validation, which no worker notices: such a row once waited for ever."""
    broker, killed = Calls(), []
    states = iter([False, True])
    monkeypatch.setattr(group_module, "ROOM_LOOK_S", 0.01)
    monkeypatch.setattr(group_module, "is_broken", lambda group: next(states, False))
    dead = threading.Event()
    monkeypatch.setattr(group_module.ray, "kill", lambda worker: (killed.append(worker), dead.set()))
    original = train.fit

    def fit(host: Any, run: str, loop: asyncio.AbstractEventLoop) -> None:
        if killed:
            return original(host, run, loop)
        asyncio.run_coroutine_threadsafe(host.take(0, 0, "worker 0"), loop).result(60)
        assert dead.wait(60)
        assert asyncio.run_coroutine_threadsafe(host.take(0, 0, "worker 0 again"), loop).result(60) is None
        if ends == "with an error":
            raise TrainingFailedError
        return None

    monkeypatch.setattr(train, "fit", fit)
    train.starts += [None]
    run_alone(monkeypatch, segment(broker, train))
    assert killed == ["worker 0"] and [owner for _, owner in train.ran] == ["row"]
    assert broker.names.count("note") == 1


def test_a_fatal_error_ends_the_group(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train.starts += [None, None]
    failing = Calls()

    async def scene(host: Any) -> None:
        assert await host.run(segment(Calls(), train, "good"))
        failing.answers["failure"] = "distill: the loss is not finite"
        with pytest.raises(SegmentFailed, match="not finite"):
            await host.run(segment(failing, train, "bad"))
        assert host.group is None
        assert await host.run(segment(Calls(), train, "next"))
        await host.close()

    play(monkeypatch, scene)
    assert [owner for _, owner in train.ran] == ["good", "next"] and len({run for run, _ in train.ran}) == 2
    # Of the stage that failed the checkpoints stay, for who tries it again.
    assert [forgotten[0] for forgotten in train.forgotten if isinstance(forgotten, tuple)] == [["of good"], ["of next"]]
    assert failing.names[-2:] == ["vacate", "failure"]


def test_checkpoints_of_stages_that_were_not_admitted_stay(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train.starts += [None]
    train.refused.add("row")
    run_alone(monkeypatch, segment(Calls(), train))
    assert train.forgotten[0][0] == [] and train.ran == []


def test_nothing_is_run_in_a_kept_group_after_the_end_of_the_sweep(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.starts += [None]

    async def scene(host: Any) -> None:
        assert await host.run(segment(Calls(), train, "a"))
        assert await host.run(segment(Calls(may_start=False), train, "b"))
        await host.close()
        assert await host.take(0, 0) is None

    play(monkeypatch, scene)
    assert [owner for _, owner in train.ran] == ["a"]


def test_one_worker_needs_no_torch_in_the_host() -> None:
    """Torch's import would stand between the command and the start of every worker group."""
    code = (
        "import sys; from cast_ray.runtime.worker import group; import cast_ray.runtime.sweep.row_driver; "
        "print(group._trainer_class(1).__name__, 'torch' in sys.modules, group._trainer_class(2).__name__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["DataParallelTrainer", "False", "TorchTrainer"]
