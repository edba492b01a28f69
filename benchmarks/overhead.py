"""What orchestration costs: a 4-row demo sweep against the bare training loops inside it, broken down.

    python benchmarks/overhead.py                          # runs the demo in a folder of its own, then reads it
    python benchmarks/overhead.py --run runs/losses-shapes-demo

The rival is what a script without Ray would spend as well: the seconds from asking for a stage's first batch to its
last step, summed over the unique train stages. Ours is the time of all slots (two stages at a time on two cores) from
the start of the command to its end, so that slots that stand idle while rows wait for a shared stage count too; with
--run it is from the first row's start to the last one's end. Also said: what the starts of worker groups and a stage's
surroundings would be of stages of 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LONG_STAGE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run, with one result.json a row")
    parser.add_argument("--slots", type=int, default=2, help="stages at a time in that run (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="further options of ablate.py for the demo, after --")
    arguments = parser.parse_args()
    if arguments.run:
        _report(_results(arguments.run), None, arguments.slots)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "sweeps/ablate.py", "losses", "--preset", "shapes", "--address", "local"]
        command += ["--storage", f"{folder}/storage", "--out", f"{folder}/runs", *arguments.options]
        began = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wall_s = time.monotonic() - began
        (run,) = Path(folder, "runs").iterdir()
        _report(_results(run), wall_s, arguments.slots)


def _results(run: Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in sorted(run.glob("*/result.json"))]
    if not results:
        sys.exit(f"no result.json below {run}")
    return results


def _report(results: list[dict[str, Any]], wall_s: float | None, slots: int) -> None:
    stages = list({s["fingerprint"]: s for r in results for s in r["stages"] if not s["reused"]}.values())
    train = [s for s in stages if s["kind"] == "train"]
    groups = [s["startup_seconds"] for s in stages if s.get("startup_seconds")]
    around = [s["stage_seconds"] - s["seconds"] for s in train]
    loops = [s["seconds"] for s in train]
    parts = {
        "train loops": loops,
        "start of a worker group, to its first stage": groups,
        "train stage, around its loop (model, stream, commit)": around,
        "evaluation, whole": [s["stage_seconds"] for s in stages if s["kind"] == "evaluate"],
        "labelling, whole": [s["stage_seconds"] for s in stages if s["kind"] == "label"],
    }
    for title, values in parts.items():
        if values:
            print(f"{title:55} n {len(values):3}  median {statistics.median(values):7.1f} s  sum {sum(values):7.1f} s")
    used = sum(map(sum, parts.values()))
    rows = _span_s(results)
    total = slots * (wall_s or rows)
    print(f"{'slots without a stage (waiting, Tune, teardown)':55} {'':25}  sum {max(slots * rows - used, 0.0):7.1f} s")
    if wall_s:
        print(f"{'command around its rows (plan, Ray, report)':55} {'':25}  sum {slots * (wall_s - rows):7.1f} s")
        print(f"wall time of the command {wall_s:.0f} s, of its rows {rows:.0f} s")
    print(f"share of all slots' time spent in training loops: {100 * sum(loops) / total:.0f} %")
    print(f"share of running stages' time spent in training loops: {100 * sum(loops) / used:.0f} %")
    extra = (sum(groups) + sum(around)) / len(train)
    share = 100 * extra / (extra + LONG_STAGE_S)
    print(f"around a train stage: {extra:.1f} s on average, {share:.1f} % of a slot's time if its loop took 5 minutes")
    print(
        json.dumps(
            {
                "name": "overhead",
                "ours": round(total, 1),
                "theirs": round(sum(loops), 1),
                "ratio": round(sum(loops) / total, 3),
                "unit": "slot-s",
            }
        )
    )


def _span_s(results: list[dict[str, Any]]) -> float:
    """Seconds from the first row's start to the last one's end."""
    starts = [datetime.fromisoformat(r["started"]).timestamp() for r in results]
    return max(start + r["seconds"] for start, r in zip(starts, results)) - min(starts)


if __name__ == "__main__":
    main()
