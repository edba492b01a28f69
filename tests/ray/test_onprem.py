"""`cluster/onprem.yaml` from `ray up` to `ray down` on machines of its own, with stand-ins for ssh and rsync alone.

Two workers join a head, a sweep is submitted through the tunnel of `ray dashboard`, and nobody gets in without token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from growing_cluster import why_not_isolated
from machines import OPERATOR, in_machines, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not_isolated()), reason=f"no namespaces of its own here: {why_not_isolated()}"),
]

ROOT = Path(__file__).parents[2]
HEAD, WORKERS, STRANGER = "head.example.com", ["gpu1.example.com", "gpu2.example.com"], "stranger.example.com"
SMALL = ("data.shapes.num_source=8", "data.shapes.num_train=16", "data.shapes.num_val=6")
SWEEP = ["python", "sweeps/ablate.py", "losses", "--preset", "shapes", "--scale", "smoke", "--rows", "sup"]
SWEEP += [part for setting in SMALL for part in ("--set", setting)]
DASHBOARD = "http://localhost:8265"
JOIN = f"ray start --address={HEAD}:6379 --num-cpus=0"
BASHRC = """export PATH={bin}:$PATH OMP_NUM_THREADS=1
export RAY_agent_register_timeout_ms=120000 RAY_DASHBOARD_STARTUP_TIMEOUT_S=180
"""
"""Where the stand-ins are, also for a login shell of the head, and what a node needs that shares two cores with three
others: a raylet gives up when its agents need more than 15 s."""

COUNT = "ps -eo comm= | grep -cxE 'raylet|gcs_server' || true"

Steps = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="onp-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def steps(folder: Path) -> Steps:
    """What the operator's commands said: name of each -> (exit code, output)."""
    names = [HEAD, *WORKERS, STRANGER]
    text = (ROOT / "cluster/onprem.yaml").read_text()
    # What the comments ask a user to change.
    text = text.replace("/opt/cast_ray/bin", str(Path(sys.executable).parent))
    text = text.replace("/shared/cast_ray", str(folder / "storage"))
    (folder / "cluster.yaml").write_text(text)
    provider = yaml.safe_load(text)["provider"]
    assert (provider["head_ip"], provider["worker_ips"]) == (HEAD, WORKERS)
    for name in (*names, OPERATOR):
        (folder / name / "home").mkdir(parents=True)
        (folder / name / "home/.bashrc").write_text(BASHRC.format(bin=folder / "bin"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = in_machines(folder, names, [sys.executable, __file__, str(folder)])
    clean["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/helpers'}"
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=1500)
    so_far = (folder / "steps.json").read_text() if (folder / "steps.json").is_file() else ""
    assert done.returncode == 0, done.stdout + done.stderr + so_far.replace("\\n", "\n")
    return {name: tuple(said) for name, said in json.loads((folder / "steps.json").read_text()).items()}


def operate(folder: Path) -> None:
    """What an operator types, one after the other; runs on the operator's machine."""
    said: Steps = {}
    config = str(folder / "cluster.yaml")
    os.environ["RAY_AUTH_MODE"] = "token"

    def run(step: str, *command: str, **variables: str) -> None:
        environment = {name: value for name, value in (os.environ | variables).items() if value}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        said[step] = (done.returncode, done.stdout + done.stderr)
        (folder / "steps.json").write_text(json.dumps(said))

    run("make the token", "ray", "get-auth-token", "--generate")
    token = (Path.home() / ".ray/auth_token").read_text().strip()
    run("up", "ray", "up", "--yes", "--no-config-cache", config)
    tunnel = subprocess.Popen(["ray", "dashboard", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ask("/api/version", token)[0] == 200, 300)
    wait_for(lambda: len(nodes(token)) == 1 + len(WORKERS), 300)
    said["nodes"] = (0, " ".join(sorted(nodes(token))))
    said["ask without the token"] = ask("/api/jobs/")
    said["ask with another token"] = ask("/api/jobs/", "0" * 64)
    said["ask with the token"] = ask("/api/jobs/", token)
    run("submit without the token", "ray", "job", "submit", "--address", DASHBOARD, "--", "true", RAY_AUTH_MODE="")
    run("copy the token", "rsync", str(Path.home() / ".ray/auth_token"), f"{STRANGER}:~/.ray/auth_token")
    shell = f". ~/.bashrc; export PATH={Path(sys.executable).parent}:$PATH; unset RAY_AUTH_MODE"
    run("join without the mode", "ssh", STRANGER, f"{shell}; timeout 300 {JOIN}")
    run("join", "ssh", STRANGER, f"{shell}; RAY_AUTH_MODE=token timeout 300 {JOIN}; code=$?; ray stop; exit $code")
    # A submission that waits follows the log over a connection that the stand-in of the tunnel does not close.
    submit = ["ray", "job", "submit", "--address", DASHBOARD, "--no-wait", "--submission-id", "sweep"]
    run("submit", *submit, "--working-dir", ".", "--", *SWEEP)
    wait_for(lambda: job_status(token) in ("SUCCEEDED", "FAILED", "STOPPED"), 900)
    run("sweep", "ray", "job", "logs", "--address", DASHBOARD, "sweep")
    said["status"] = (0, job_status(token))
    run("down", "ray", "down", "--yes", config)
    tunnel.terminate()
    for name in (HEAD, *WORKERS):
        run(f"left at once on {name}", "ssh", name, COUNT)

    def are_gone() -> bool:
        for name in WORKERS:
            run(f"left on {name}", "ssh", name, COUNT)
        return all(said[f"left on {name}"][1].strip() == "0" for name in WORKERS)

    wait_for(are_gone, 400)


def ask(path: str, token: str = "") -> tuple[int, str]:
    """Status and body of an answer of the dashboard; 0 where there is none."""
    request = urllib.request.Request(DASHBOARD + path)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def job_status(token: str) -> str:
    status, body = ask("/api/jobs/sweep", token)
    return str(json.loads(body)["status"]) if status == 200 else ""


def nodes(token: str) -> list[str]:
    """Host names of the nodes that are up."""
    status, body = ask("/nodes?view=summary", token)
    found: list[dict[str, Any]] = json.loads(body)["data"]["summary"] if status == 200 else []
    return [node["hostname"] for node in found if node["raylet"].get("state") == "ALIVE"]


def test_ray_up_starts_all_machines(steps: Steps) -> None:
    assert steps["up"][0] == 0, steps["up"][1]
    assert steps["nodes"][1].split() == sorted([HEAD, *WORKERS])


def test_nobody_gets_in_without_the_token(steps: Steps) -> None:
    assert steps["ask without the token"][0] == 401 and steps["ask with another token"][0] == 403
    assert steps["ask with the token"][0] == 200
    code, output = steps["submit without the token"]
    assert code != 0 and "oken authentication is enabled" in output, output


def test_a_node_that_has_the_token_but_not_the_mode_cannot_join(steps: Steps) -> None:
    """The trap that docs/cluster.md describes."""
    assert steps["copy the token"][0] == 0
    code, output = steps["join without the mode"]
    assert code != 0 and "InvalidAuthToken" in output, output
    assert steps["join"][0] == 0, steps["join"][1]


def test_a_sweep_runs_on_the_workers(steps: Steps, folder: Path) -> None:
    assert steps["submit"][0] == 0, steps["submit"][1]
    assert steps["status"][1] == "SUCCEEDED", steps["sweep"][1]
    (result,) = (folder / "storage").rglob("losses__sup__s0/result.json")
    computed = {node["node"] for stage in json.loads(result.read_text())["stages"] for node in stage["computed_on"]}
    assert computed and computed <= set(WORKERS)  # the head offers no CPU


def test_ray_down_ends_all_processes(steps: Steps) -> None:
    assert steps["down"][0] == 0, steps["down"][1]
    assert steps[f"left at once on {HEAD}"][1].strip() == "0"
    assert [steps[f"left on {name}"][1].strip() for name in WORKERS] == ["0", "0"]


if __name__ == "__main__":
    operate(Path(sys.argv[1]))
