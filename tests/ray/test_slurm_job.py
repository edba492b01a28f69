"""`cluster/slurm.sbatch` with the real `ray symmetric-run` on two machines; stand-ins are only srun and scontrol.

The job's time is over in the middle of a stage: it goes back into the queue, and finishes from a checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from growing_cluster import why_not_isolated
from machines import OWN_FOLDERS, in_machines, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not_isolated()), reason=f"no namespaces of its own here: {why_not_isolated()}"),
]

ROOT = Path(__file__).parents[2]
NODES, JOB = ["node7", "node8"], "4711"
STEPS, EVERY = 300, 10
SETTINGS = [
    "stages.pretrain.steps=3",
    "stages.adapt.steps=2",
    f"stages.distill.steps={STEPS}",
    f"stages.distill.checkpoint_every_steps={EVERY}",
    "stages.refine.steps=2",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "refine", "distill")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "teacher.num_layers=1",
]
SWEEP = ["losses", "--preset", "shapes", "--scale", "smoke", "--rows", "sup", "--out", "runs"]
SWEEP += [part for setting in SETTINGS for part in ("--set", setting)]
SRUN = """#!/usr/bin/env bash
# One task on each node of the job, or on the one that is named; their environment is the caller's.
nodes=(node7 node8)
while [[ $1 == -* ]]; do
  if [[ $1 == --nodelist=* ]]; then nodes=("${1#*=}"); fi
  shift
done
variables=$(export -p | grep -v -e ' HOME=' -e ' PWD=')
for node in "${nodes[@]}"; do
  ssh "$node" "$variables; cd $PWD; $(printf '%q ' "$@")" &
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$*" >> "$QUEUE"; fi
"""
END_OF_A_NODE = (
    'for p in $(ps -eo pid=); do if [[ $p -gt 2 && $p != "$$" ]]; then kill -9 "$p"; fi; done 2> /dev/null; true'
)
"""Slurm ends whatever a job has left on its nodes; 1 and 2 are the machine itself."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="slm-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def test_a_job_whose_time_is_over_continues_from_its_checkpoint(folder: Path) -> None:
    for tool, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = folder / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(body)
        path.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
        OWN_FOLDERS: f"/tmp/ray:/tmp/ray-{JOB}",
        # A raylet gives up when its agents need more than 15 s, as on a busy machine.
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
        "OMP_NUM_THREADS": "1",
    }
    command = in_machines(folder, NODES, [sys.executable, __file__, str(folder)])
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=1500)
    logs = [(folder / f"job-{start}.log").read_text() for start in (0, 1) if (folder / f"job-{start}.log").is_file()]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["queue"] == f"requeue {JOB}" and seen["code"] == 0, logs
    (result,) = (folder / "storage").rglob("losses__sup__s0/result.json")
    outcome = json.loads(result.read_text())
    (distill,) = [stage for stage in outcome["stages"] if stage["name"] == "distill"]
    assert outcome["status"] == "done" and distill["resumed_at_step"] >= seen["checkpoint"] >= EVERY
    assert {node["node"] for stage in outcome["stages"] for node in stage["computed_on"]} <= set(NODES)


def operate(folder: Path) -> None:
    """What Slurm does with the job: starts it, warns it, ends it, and starts it again."""

    def start(restarts: int) -> subprocess.Popen[bytes]:
        variables = {
            "CAST_RAY_STORAGE": folder / "storage",
            "CAST_RAY_PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": folder,
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": len(NODES),
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_RESTART_COUNT": restarts,
            "QUEUE": folder / "queue",
            "PATH": os.environ["PATH"],
        }
        exports = " ".join(f"{name}={value}" for name, value in variables.items())
        script = f"export {exports}; echo $$ > {folder}/pid; exec bash {ROOT}/cluster/slurm.sbatch {' '.join(SWEEP)}"
        with (folder / f"job-{restarts}.log").open("wb") as log:
            return subprocess.Popen(["ssh", NODES[0], script], stdout=log, stderr=log)

    def checkpoint() -> int:
        notes = (folder / "storage/checkpoints").glob("*.json")
        return max((json.loads(path.read_text())["step"] for path in notes), default=0)

    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    job = start(0)
    wait_for(lambda: checkpoint() >= EVERY or job.poll() is not None, 900)
    assert job.poll() is None, "the job ended before its first checkpoint"
    # --signal=B:USR1: to the script alone.
    subprocess.run(["ssh", NODES[0], f"kill -USR1 $(cat {folder}/pid)"], check=True)
    wait_for((folder / "queue").is_file)
    reached = checkpoint()
    for node in NODES:
        subprocess.run(["ssh", node, END_OF_A_NODE], check=True)
    job.wait(60)
    time.sleep(1)
    code = start(1).wait(900)
    seen = {"queue": (folder / "queue").read_text().strip(), "checkpoint": reached, "code": code}
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    operate(Path(sys.argv[1]))
