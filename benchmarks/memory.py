"""Peak memory of every kind of process of a run, for a dataset and for one ten times its size.

    python benchmarks/memory.py --sizes 1000 10000

Runs the row sup+semi of the losses table on drawn scenes (a few steps: memory does not wait for more), looks at the
memory of all its processes several times a second, and prints the peak of each kind: private memory (RssAnon), without
the object store that is mapped into all of them. The rival is a worker that keeps the decoded images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "CAST_RAY_MEMORY"
PAUSE_S = 0.2
SCENE_PX = 64
KINDS = {
    "command": "ablate.py",
    "row driver": "ImplicitFunc",
    "host of a group": "GroupHost",
    "Train worker": "RayTrainWorker",
    "Data task": "ReadPlanSource",
    "broker": "Broker",
}
"""Kind of process -> what its title holds while it works."""


def settings(size: int) -> list[str]:
    stages = ("pretrain", "adapt", "selftrain", "distill", "refine")
    pairs = [f"stages.{stage}.{field}" for stage in stages for field in ("steps=4", "batch_labelled=2")]
    pairs += [f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")]
    pairs += [f"data.shapes.num_train={size}", "data.shapes.num_source=8", "data.shapes.num_val=4"]
    return [part for pair in pairs for part in ("--set", pair)]


def processes(mark: str) -> list[Path]:
    """Folders in /proc of the living processes that a run has started."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
        except OSError:  # gone, or not ours
            continue
    return found


def private_mb(folder: Path) -> float:
    lines = (folder / "status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def run(size: int, folder: Path) -> dict[str, float]:
    """Kind of process -> the highest peak of one such process, MB."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "sweeps/ablate.py", "losses", "--rows", "sup+semi", "--scale", "smoke"]
    command += ["--address", "local", "--storage", str(folder / "storage"), "--out", str(folder / "runs")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark}
    log = (folder / "log.txt").open("w")
    began = time.monotonic()
    running = subprocess.Popen([*command, *settings(size)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    peaks: dict[str, float] = {}
    kinds: dict[str, str] = {}
    pause = threading.Event()
    while running.poll() is None:
        for process in processes(mark):
            try:
                title, memory = (process / "cmdline").read_bytes().decode(errors="replace"), private_mb(process)
            except OSError:
                continue
            peaks[process.name] = max(peaks.get(process.name, 0.0), memory)
            kinds[process.name] = next((k for k, sign in KINDS.items() if sign in title), kinds.get(process.name, ""))
        pause.wait(PAUSE_S)
    log.close()
    if running.returncode:
        sys.exit((folder / "log.txt").read_text())
    print(f"{size} images: {time.monotonic() - began:.0f} s")
    return {kind: max((peaks[p] for p, k in kinds.items() if k == kind), default=0.0) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=(1000, 10_000), help="images of the training split")
    small, large = parser.parse_args().sizes
    found = []
    for size in (small, large):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(size, Path(folder)))
    print(f"{'peak of private memory, MB':28} {small:>9} {large:>9}   images")
    for kind in KINDS:
        print(f"{kind:28} {found[0][kind]:9.0f} {found[1][kind]:9.0f}")
    ours = max(max(found[1][kind] - found[0][kind] for kind in ("Train worker", "Data task")), 1.0)
    theirs = (large - small) * SCENE_PX**2 * 3 / 2**20
    facts = {"name": "memory growth with the dataset", "ours": round(ours, 1), "theirs": round(theirs, 1)}
    print(json.dumps(facts | {"ratio": round(theirs / ours, 1), "unit": "MB"}))


if __name__ == "__main__":
    main()
