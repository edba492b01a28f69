"""A cluster that an autoscaler grows, on this machine: Ray's fake multi-node provider in a PID namespace of its own.

`ray.cluster_utils.AutoscalingCluster` ends every Ray of the machine when it starts, and needs a file that Ray's wheel
lacks. Here the head is started directly; and as this script is the first process of its namespace, the kernel ends all
that it has started, on whatever path it ends. Nodes are real raylets with logical resources.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ISOLATED = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
HEAD = "ray.head.default"
STORE_BYTES = 200 * 2**20


def why_not_isolated() -> str:
    """Why this system gives no PID namespace; empty where it does."""
    try:
        done = subprocess.run([*ISOLATED, "true"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"unshare ended with {done.returncode}" if done.returncode else ""


def in_growing_cluster(node_types: dict[str, Any], command: list[str]) -> list[str]:
    """The command line that runs a command with RAY_ADDRESS set to a cluster of a head without CPUs.

    Args:
        node_types: name -> resources, min_workers and max_workers of what the autoscaler may start.
    """
    return [*ISOLATED, sys.executable, __file__, json.dumps(node_types), *command]


def autoscaler_config(node_types: dict[str, Any], gcs_address: str) -> dict[str, Any]:
    """What Ray's own example of a fake cluster says, with these types of nodes."""
    types = {HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for name, node in node_types.items():
        types[name] = {
            **node,
            "node_config": {},
            "resources": {"object_store_memory": STORE_BYTES, **node["resources"]},
        }
    provider: dict[str, Any] = {"type": "fake_multinode", "gcs_address": gcs_address}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    config: dict[str, Any] = {"cluster_name": "growing", "max_workers": 8, "provider": provider}
    config |= {"available_node_types": types, "head_node_type": HEAD, "upscaling_speed": 1.0, "idle_timeout_minutes": 5}
    config |= {name: {} for name in ("auth", "docker", "file_mounts")}
    phases = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return config | {f"{phase}_commands": [] for phase in phases} | {"cluster_synced_files": []}


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> int:
    import ray

    node_types, command = json.loads(sys.argv[1]), sys.argv[2:]
    assert os.getpid() == 1, "only in a PID namespace of its own"
    gcs, dashboard, client = _free_ports(3)
    address = f"{ray.util.get_node_ip_address()}:{gcs}"
    with tempfile.TemporaryDirectory(prefix="grow", dir="/tmp") as folder:
        config = Path(folder) / "autoscaler.json"
        config.write_text(json.dumps(autoscaler_config(node_types, address)))
        os.environ |= {"RAY_TMPDIR": folder, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        # A first local Ray of this user has left a token that a head takes up and its clients do not.
        os.environ["RAY_AUTH_MODE"] = "disabled"
        # A raylet ends itself when its agents need more than 15 s, as on a busy machine.
        os.environ |= {"RAY_agent_register_timeout_ms": "120000", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180"}
        head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={gcs}", "--num-cpus=0"]
        head += [f"--autoscaling-config={config}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        head += [f"--ray-client-server-port={client}"]
        subprocess.run(
            [*head, f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"], check=True, timeout=240
        )
        return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
