"""Every private name of Ray that this project uses, with what to do where a release no longer has it.

All were read in Ray 2.60.0. `tests/unit/runtime/test_ray_internals.py` fails where the installed Ray has lost one, and
where another module uses a private name.

- ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError: tells resources that others took from a fault; and
  WorkerGroupStartupFailedError: tells a worker that was lost while its group started. Only their names are compared.
- ray.experimental.internal_kv._internal_kv_get and the key `__autoscaling_status`: what version 1 of the autoscaler
  notes of itself. Without it a cluster counts as one that may grow.
- ray.data._internal.execution.execution_callback.ExecutionCallback: base of `PacedLoop`. Without it no stream is paced.
- StreamingExecutor._topology: read by `PacedLoop`. Without it no turn is paused.
- ray._private.worker.print_to_stdstream: prints what raylets push to the command. Without it a lost process is told in
  Ray's words, too.
"""

from __future__ import annotations

import json
import time
from typing import Any

import ray

try:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:  # another release of Ray
    ExecutionCallback = object  # type: ignore[misc, assignment]

LOOP_PAUSE_S = 0.02
STARTUP_TIMEOUT, STARTUP_FAILED = "WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"
AUTOSCALER_STATUS = "__autoscaling_status"
NODE_GROUP_LABEL = "ray.io/node-group"
STATUS_WAIT_S = 10.0
"""The monitor of a cluster writes its first status some seconds after its head has started."""
INFEASIBLE = "No available node types can fulfill"
"""How both versions of the autoscaler begin to say that no node they may start would do."""
EVENTS_TIMEOUT_S = 5


def hide_pushed_errors() -> None:
    """Keeps what raylets push to every command from its output: 1,000 characters for each process that is lost.

    `log_to_driver` does not cover them. Who is hit says so itself, in a sentence, and Ray's own words are in its logs.
    """
    try:
        from ray._private import worker

        shown = worker.print_to_stdstream
    except (ImportError, AttributeError):
        return

    def show(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if data.get("pid") != "raylet":
            shown(data, *arguments, **options)

    if shown.__module__ != __name__:
        worker.print_to_stdstream = show


def is_startup_timeout(error: BaseException) -> bool:
    """Whether a worker group could not start because its resources were taken meanwhile.

    Compares names and not classes: the class is private, and importing its module would fail where it has moved.
    """
    return _is_called(error, STARTUP_TIMEOUT)


def is_lost_at_start(error: BaseException) -> bool:
    """Whether a worker was lost while its group started. Train counts that as its controller's fault,
    which it does not retry here, and not as one of its workers'."""
    return _is_called(error, STARTUP_FAILED) or isinstance(error, ray.exceptions.RayActorError)


def _is_called(error: BaseException, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(error).__mro__)


def has_autoscaler() -> bool:
    """Whether something starts nodes for this cluster when its resources do not suffice; True where it is not known.

    Nodes that an autoscaler of version 2 or KubeRay manages name their node group in a label, the head too. Version 1
    writes a status instead; so does, on every cluster, the monitor that only watches, but that one gives each node a
    type of its own, named after the node.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if any(NODE_GROUP_LABEL in node["Labels"] for node in nodes):
        return True
    deadline = time.monotonic() + STATUS_WAIT_S
    while (types := _node_types()) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return types is None or not types <= {f"node_{node['NodeID']}" for node in ray.nodes()}


def _node_types() -> set[str] | None:
    """Types of the nodes as the autoscaler of version 1 knows them; None: it has not said."""
    try:
        from ray.experimental.internal_kv import _internal_kv_get

        status = json.loads(_internal_kv_get(AUTOSCALER_STATUS) or b"{}")
        return set(status["autoscaler_report"]["active_nodes"] or ()) or None
    except (ImportError, KeyError, TypeError, ValueError):
        return None


def autoscaler_complaint() -> str:
    """The last that the autoscaler said of resources that no node it may start has; empty: nothing, as far as is known.

    Read from the cluster's events, which need Ray's dashboard.
    """
    from ray.util.state import list_cluster_events

    try:
        events = list_cluster_events(timeout=EVENTS_TIMEOUT_S)
    except Exception:  # there is no dashboard, or it is slow: what is shown is one reason fewer
        return ""
    said = [event for event in events if INFEASIBLE in event["message"]]
    return str(max(said, key=lambda event: event["time"])["message"]).strip() if said else ""


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
