"""`ray start --head`, `ray job submit`, `ray job logs`, `ray job stop`: as the README says, on ports of its own.

Every request needs a token, as on the clusters of `cluster/`.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.utils import get_ray_address_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
SMALL = ["--set", "data.shapes.num_source=8", "--set", "data.shapes.num_train=16", "--set", "data.shapes.num_val=6"]
TABLE = ["python", "sweeps/ablate.py", "losses", "--preset", "shapes", "--scale", "smoke", *SMALL]
SWEEP = [*TABLE, "--rows", "sup"]


# One a cluster, detached by Ray Data itself for all jobs to come; it holds no resources.
RAYS_OWN = {"_AutoscalingCoordinatorActor", "_StatsActor"}


class Head:
    """A Ray of one node, started by its command line."""

    def __init__(self, folder: Path):
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        ports = dict(zip(names, free_ports(len(names))))
        self.port = ports["port"]
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        # A home of its own, with the token: one that the user may have does not belong to this cluster.
        self.token = secrets.token_hex(32)
        (folder / ".ray").mkdir()
        (folder / ".ray/auth_token").write_text(self.token)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = clean | {
            "HOME": str(folder),
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "CAST_RAY_STORAGE": str(folder / "storage"),
        }
        self.runs = folder / "storage/runs"
        options = [f"--{name}={port}" for name, port in ports.items()]
        self.log = folder / "head.log"
        self.process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=6", "--disable-usage-stats", *options],
            env=self.environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_ready(self) -> bool:
        """Whether a node's agent, which starts jobs, is there."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.job("list").returncode == 0 and bool(self.ask("/nodes?view=summary")["data"]["summary"])
        except OSError:
            return False

    def job(self, verb: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), "job", verb, "--address", self.address, *arguments]
        environment = self.environment | variables
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def living_actors(self) -> list[str]:
        found = self.ask("/api/v0/actors?detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        names = [actor["class_name"] for actor in found["data"]["result"]["result"]]
        return [name for name in names if name not in RAYS_OWN]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        # `ray start` notes its address for all of this machine, and other Rays would look for this one for ever.
        noted = Path(get_ray_address_file(None))
        if noted.is_file() and noted.read_text().endswith(f":{self.port}"):
            noted.unlink()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("head"))
    try:
        wait_until(started.is_ready, "the head did not come up", 180)
        yield started
    finally:
        started.stop()


def submit_when_possible(head: Head, wait_until: Callable[..., None], *arguments: str) -> str:
    """Output of a submission; a cluster that has just come up may have no agent for some seconds more."""
    outputs: list[str] = []

    def submitted() -> bool:
        done = head.job("submit", *arguments)
        outputs.append(done.stdout + done.stderr)
        return done.returncode == 0 or "No available agent" not in outputs[-1]

    wait_until(submitted, "no agent took the job", 1200)
    return outputs[-1]


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)])
@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/actors", "/nodes?view=summary"])
def test_a_request_without_the_token_is_refused(head: Head, path: str, headers: dict[str, str], status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(head.address + path, headers=headers), timeout=30)
    assert refused.value.code == status


def test_a_command_without_the_token_is_refused(head: Head, tmp_path: Path) -> None:
    done = head.job("submit", "--no-wait", "--", "true", HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
    assert done.returncode != 0 and "Token authentication is enabled" in done.stdout + done.stderr
    assert head.ask("/api/jobs/") == []


def test_a_job_runs_the_whole_table_and_its_log_is_readable(head: Head, wait_until: Callable[..., None]) -> None:
    output = submit_when_possible(head, wait_until, "--submission-id", "first", "--working-dir", ".", "--", *TABLE)
    assert "succeeded" in output, output
    log = head.job("logs", "first").stdout
    for part in ("What each loss term is worth", "to run, ", "losses__sup__s0  distill", "of 26 steps", "Report: "):
        assert part in log, log
    (page,) = head.runs.glob("*/report.md")  # below the storage path, which outlives the job's folder
    assert f"Write it again: cast-ray report {page.parent}" in log and not (head.runs.parents[1] / "cast_ray").exists()
    assert all(json.loads(path.read_text())["status"] == "done" for path in page.parent.glob("*/result.json"))
    assert len(list(page.parent.glob("*/result.json"))) == 4
    wait_until(lambda: not head.living_actors(), f"actors left behind: {head.living_actors()}", 60)


def test_a_stopped_job_leaves_no_actor_behind(head: Head, wait_until: Callable[..., None]) -> None:
    long = ["--set", "stages.distill.steps=100000", "--seeds", "7"]
    submit_when_possible(
        head, wait_until, "--no-wait", "--submission-id", "second", "--working-dir", ".", "--", *SWEEP, *long
    )
    wait_until(lambda: "RayTrainWorker" in " ".join(head.living_actors()), "no training started", 300)
    stopped = head.job("stop", "second")
    assert stopped.returncode == 0, stopped.stderr
    wait_until(lambda: not head.living_actors(), f"actors left behind: {head.living_actors()}", 120)
    groups = head.ask("/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
    assert {group["state"] for group in groups} <= {"REMOVED"}


def test_two_jobs_at_once_share_the_cluster_and_the_store(head: Head, wait_until: Callable[..., None]) -> None:
    """More workers than the cluster holds: who has no room waits, and no stage is run twice."""
    wide = ["--set", "runtime.cpus_per_worker=2", "--set", "runtime.cpus_per_read=1", "--seeds", "3", "4"]
    names = ["third", "fourth"]
    for name in names:
        options = ["--no-wait", "--submission-id", name, "--working-dir", ".", "--"]
        submit_when_possible(head, wait_until, *options, *SWEEP, *wide, "--name", name)
    wait_until(lambda: all(status(head, name) != "RUNNING" for name in names), "a job hangs", 900)
    assert [status(head, name) for name in names] == ["SUCCEEDED"] * 2, head.job("logs", names[0]).stdout
    found = [json.loads(path.read_text()) for name in names for path in (head.runs / name).glob("*/result.json")]
    assert len(found) == 4
    ran = Counter(s["fingerprint"] for result in found for s in result["stages"] if not s["reused"])
    assert set(ran.values()) == {1}


def status(head: Head, name: str) -> str:
    found = head.ask(f"/api/jobs/{name}")["status"]
    return "RUNNING" if found == "PENDING" else found
