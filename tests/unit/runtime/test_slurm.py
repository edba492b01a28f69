"""cluster/slurm.sbatch with stand-ins for Slurm and Ray: what runs where, jobs that are put back, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "slurm.sbatch"
STAND_INS = {
    # Every task of a step: here the first node's, which is where `ray symmetric-run` runs the command.
    "srun": """
        echo "srun $*" >> "$LOG"
        while [[ $1 == -* ]]; do shift; done
        exec "$@"
    """,
    "scontrol": """
        echo "scontrol $*" >> "$LOG"
        if [[ $1 == show ]]; then printf '%s\\n' node7 node8; fi
    """,
    "hostname": "echo 10.0.0.7 fe80::7",
    "ray": """
        echo "ray $*" >> "$LOG"
        echo "token $RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$LOG"
        echo "folder $RAY_TMPDIR" >> "$LOG"
        if [[ -n ${RAY_CANNOT_START:-} ]]; then exit 0; fi  # as Ray does
        while [[ $1 != -- ]]; do shift; done
        shift
        exec "$@"
    """,
    "stand-in-python": """
        if [[ $1 == -c ]]; then exec "$REAL_PYTHON" "$@"; fi
        echo "ran $* at $RAY_ADDRESS" >> "$LOG"
        sleep "${SWEEP_S:-0}"
        exit "${SWEEP_CODE:-0}"
    """,
}


@dataclass
class Job:
    """A job on nodes node7 and node8; `start` runs the script as Slurm would."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.is_file() else ""

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment = {
            **kept,
            "PATH": f"{self.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "LOG": str(self.folder / "log"),
            "REAL_PYTHON": sys.executable,
            "CAST_RAY_PYTHON": str(self.folder / "environment" / "stand-in-python"),
            "CAST_RAY_STORAGE": "/shared/store",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={name: value for name, value in (environment | variables).items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for name, body in STAND_INS.items():
        # Ray and Python are of an environment that is not activated.
        path = tmp_path / ("environment" if name in ("ray", "stand-in-python") else "bin") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + "\n".join(line.strip() for line in body.strip().splitlines()) + "\n")
        path.chmod(0o755)
    return Job(tmp_path)


def test_the_sweep_runs_on_the_first_node_of_a_cluster_of_all(job: Job) -> None:
    code, output = job.run("losses", "--set", "data.root=/shared/my data")
    assert code == 0, output
    assert "scontrol show hostnames node[7-8]" in job.log and "--nodelist=node7 hostname" in job.log
    (run,) = [line for line in job.log.splitlines() if line.startswith("ray ")]
    assert run.startswith("ray symmetric-run --address 10.0.0.7:24711 --min-nodes 2 -- ")
    assert "folder /tmp/ray-4711\n" in job.log
    assert "ran sweeps/ablate.py losses --set data.root=/shared/my data at 10.0.0.7:24711" in job.log
    assert "srun --nodes=2 --ntasks=2 --kill-on-bad-exit=1 ray symmetric-run" in job.log
    assert list(job.folder.glob(".cast_ray*")) == []  # nothing is left in the user's folder


def test_each_start_has_a_token_of_its_own_that_no_command_line_shows(job: Job) -> None:
    for _ in range(2):
        assert job.run("losses", RAY_AUTH_TOKEN="of the user's shell")[0] == 0
    tokens = [line.split()[2] for line in job.log.splitlines() if line.startswith("token token ")]
    assert len(set(tokens)) == 2 and all(len(token) == 64 for token in tokens)
    commands = [line for line in job.log.splitlines() if not line.startswith("token ")]
    assert not any(token in line for token in tokens for line in commands)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_the_sweeps(job: Job, code: int) -> None:
    assert job.run("losses", SWEEP_CODE=str(code))[0] == code


def test_a_ray_that_does_not_start_is_no_success(job: Job) -> None:
    code, output = job.run("losses", RAY_CANNOT_START="1")
    assert code == 1 and "Ray did not start on all nodes" in output and "\nran " not in job.log


def test_storage_must_be_named(job: Job) -> None:
    code, output = job.run("losses", CAST_RAY_STORAGE="")
    assert code != 0 and "CAST_RAY_STORAGE to a folder that all nodes see" in output and job.log == ""


@pytest.mark.parametrize(("restarts", "is_put_back"), [("", True), ("19", True), ("20", False)])
def test_a_job_whose_time_is_nearly_over_goes_back_into_the_queue(job: Job, restarts: str, is_put_back: bool) -> None:
    process = job.start("losses", SWEEP_S="3", SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 30
    while "\nran " not in job.log:
        assert time.monotonic() < deadline, job.log
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # --signal=B:USR1: to the script alone
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output  # the sweep had the time it needed; Slurm would have ended it
    assert ("scontrol requeue 4711" in job.log) == is_put_back
    assert ("goes back into the queue" in output) == is_put_back != ("submitting it again" in output)


def test_slurm_is_asked_to_put_the_job_back_and_for_nodes_without_other_users() -> None:
    options = [
        line.removeprefix("#SBATCH ").split()[0] for line in SCRIPT.read_text().splitlines() if "#SBATCH" in line
    ]
    assert {"--requeue", "--exclusive", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)
