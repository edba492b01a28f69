"""What orchestration costs: fixed cost of a worker group, of a stage and of a labelling job, from a run's own results.

    python sweeps/ablate.py losses --preset shapes && python benchmarks/overhead.py runs/losses-shapes-demo

Reads `result.json` files only. The rival is the bare training loop: the seconds from asking for a stage's first batch
to its last step, which a script without Ray would spend as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, with one result.json a row")
    run = parser.parse_args().run
    results = [json.loads(path.read_text()) for path in sorted(run.glob("*/result.json"))]
    if not results:
        parser.error(f"no result.json below {run}")
    stages = {s["fingerprint"]: s for r in results for s in r["stages"] if not s["reused"]}.values()
    train = [s for s in stages if s["kind"] == "train"]
    groups = [s["startup_seconds"] for s in stages if s.get("startup_seconds")]
    around = [s["stage_seconds"] - s["seconds"] for s in train]
    evaluations = [s["stage_seconds"] for s in stages if s["kind"] == "evaluate"]
    labelling = [s["stage_seconds"] for s in stages if s["kind"] == "label"]
    for title, values in (
        ("start of a worker group, to its first stage", groups),
        ("train stage, around its loop (model, stream, commit)", around),
        ("evaluation, whole", evaluations),
        ("labelling job, whole (with its actor's start)", labelling),
        ("train loop", [s["seconds"] for s in train]),
    ):
        if values:
            print(f"{title:55} n {len(values):3}  median {statistics.median(values):7.1f} s  sum {sum(values):7.1f} s")
    loops = sum(s["seconds"] for s in train)
    whole = loops + sum(groups) + sum(around) + sum(evaluations) + sum(labelling)
    print(f"share of slot time spent in training loops: {100 * loops / whole:.0f} %")
    print(
        json.dumps(
            {
                "name": "overhead",
                "ours": round(whole, 1),
                "theirs": round(loops, 1),
                "ratio": round(loops / whole, 3),
                "unit": "s",
            }
        )
    )


if __name__ == "__main__":
    main()
