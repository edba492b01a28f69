"""Every private name of Ray that this project uses, with what to do where a release no longer has it.

All were read in Ray 2.60.0. `tests/unit/runtime/test_ray_internals.py` fails where the installed Ray has lost one, and
where another module uses a private name.

- ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError: tells resources that others took from a fault. Only
  its name is compared.
- ray.data._internal.execution.execution_callback.ExecutionCallback: base of `PacedLoop`. Without it no stream is paced.
- StreamingExecutor._topology: read by `PacedLoop`. Without it no turn is paused.
"""

from __future__ import annotations

import time
from typing import Any

try:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:  # another release of Ray
    ExecutionCallback = object  # type: ignore[misc, assignment]

LOOP_PAUSE_S = 0.02
STARTUP_TIMEOUT = "WorkerGroupStartupTimeoutError"


def is_startup_timeout(error: BaseException) -> bool:
    """Whether a worker group could not start because its resources were taken meanwhile.

    Compares names and not classes: the class is private, and importing its module would fail where it has moved.
    """
    return any(kind.__name__ == STARTUP_TIMEOUT for kind in type(error).__mro__)


def counts_of(executor: Any) -> list[tuple[int, int, int]] | None:
    """Tasks submitted and finished, and blocks made, of each operator of a stream; None where Ray hides them."""
    try:
        metrics = [op.metrics for op in executor._topology]
        return [(m.num_tasks_submitted, m.num_tasks_finished, m.num_task_outputs_generated) for m in metrics]
    except (AttributeError, TypeError):
        return None


class PacedLoop(ExecutionCallback):  # type: ignore[misc, valid-type]
    """A pause after every turn of a stream's scheduling loop in which no task started, ended or gave a block."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.turns = self.pauses = 0

    def on_execution_step(self, executor: Any) -> None:
        now = counts_of(executor)
        if now is None:  # an idle turn cannot be told from a busy one, so none is paused
            return
        self.turns += 1
        if now == self.seen:
            self.pauses += 1
            time.sleep(LOOP_PAUSE_S)
        self.seen = now


def execution_callbacks() -> list[type]:
    """Callbacks of every stream of this process; [] where this Ray has none."""
    return [PacedLoop] if ExecutionCallback is not object else []
