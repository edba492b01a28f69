"""Private names of Ray: all in one file, all there in the installed release, and harmless where they are missing."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.autoscaler._private.util import format_readonly_node_type
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import ActorDiedError
from ray.experimental import internal_kv
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from cast_ray.runtime import ray_internals
from cast_ray.runtime.placement import NODE_LABEL
from cast_ray.runtime.ray_internals import (
    AUTOSCALER_STATUS,
    INFEASIBLE,
    NODE_GROUP_LABEL,
    PacedLoop,
    counts_of,
    execution_callbacks,
    hide_pushed_errors,
    is_lost_at_start,
    is_startup_timeout,
)

ROOT = Path(__file__).parents[3]
PRIVATE = re.compile(r"^\s*(?:from|import) ray(?:\.\w+)*\._\w+|executor\._", re.MULTILINE)


def test_the_installed_ray_has_them() -> None:
    assert execution_callbacks() == [PacedLoop]
    assert "_topology" in Path(importlib.import_module(StreamingExecutor.__module__).__file__ or "").read_text()
    assert is_startup_timeout(WorkerGroupStartupTimeoutError(num_workers=1))
    assert not is_startup_timeout(TimeoutError())
    assert is_lost_at_start(WorkerGroupStartupFailedError()) and is_lost_at_start(ActorDiedError())
    assert not is_lost_at_start(WorkerGroupStartupTimeoutError(num_workers=1)) and not is_lost_at_start(ValueError())
    assert callable(internal_kv._internal_kv_get) and AUTOSCALER_STATUS == ray_constants.DEBUG_AUTOSCALING_STATUS
    labels: Any = ray._raylet  # type: ignore[attr-defined]
    assert (NODE_GROUP_LABEL, NODE_LABEL) == (labels.RAY_NODE_GROUP_KEY, labels.RAY_NODE_ID_KEY)
    for module in ("ray.autoscaler._private.autoscaler", "ray.autoscaler.v2.event_logger"):
        assert INFEASIBLE in Path(importlib.import_module(module).__file__ or "").read_text()
    assert format_readonly_node_type("abc") == "node_abc"


def test_what_a_raylet_pushes_is_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(ray_worker, "print_to_stdstream", lambda data, ignore_prefix: said.append(data["lines"]))
    for _ in range(2):  # of a command that joins twice
        hide_pushed_errors()
    for pid in ("raylet", "autoscaler", 7):
        ray_worker.print_to_stdstream({"lines": f"of {pid}", "pid": pid, "is_err": False}, ignore_prefix=False)
    assert said == ["of autoscaler", "of 7"]
    assert "print_to_stdstream(" in inspect.getsource(ray_worker.listen_error_messages)


def test_no_other_module_names_them() -> None:
    users = [p for p in (ROOT / "cast_ray").rglob("*.py") if PRIVATE.search(p.read_text())]
    assert users == [Path(ray_internals.__file__)]


def test_a_loop_pauses_where_nothing_moved_and_only_there() -> None:
    def executor(submitted: int) -> SimpleNamespace:
        metrics = SimpleNamespace(num_tasks_submitted=submitted, num_tasks_finished=0, num_task_outputs_generated=0)
        return SimpleNamespace(_topology=[SimpleNamespace(metrics=metrics)])

    loop = PacedLoop()
    for submitted in (1, 1, 2, 2, 2):
        loop.on_execution_step(executor(submitted))
    assert (loop.turns, loop.pauses) == (5, 3)


def test_a_ray_that_hides_its_operators_is_not_paced() -> None:
    loop = PacedLoop()
    loop.on_execution_step(SimpleNamespace())
    assert counts_of(SimpleNamespace()) is None and (loop.turns, loop.pauses) == (0, 0)


def test_a_ray_without_callbacks_is_not_paced() -> None:
    code = """
import sys
sys.modules["ray.data._internal.execution.execution_callback"] = None
from cast_ray.runtime.ray_internals import execution_callbacks
assert execution_callbacks() == []
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
