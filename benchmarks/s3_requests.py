"""Requests that a smoke sweep of two rows sends to an object store, against an older checkout.

    python benchmarks/s3_requests.py --rival ../older-checkout

Each checkout runs the same command, `ablate.py losses --rows sup sup+semi --scale smoke` on drawn scenes, in processes
of its own, with `s3://` as storage: an S3-compatible server on loopback (moto's) counts what arrives. Every request is
paid for and takes tens of milliseconds on a real object store. With --paths, the paths that were asked for most.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import report

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/helpers"))

from s3_server import BUCKET, S3Server  # noqa: E402

COMMAND = ["sweeps/ablate.py", "losses", "--rows", "sup", "sup+semi", "--preset", "shapes", "--scale", "smoke"]
NUM_SHOWN = 40


def count(checkout: Path, arguments: list[str], show_paths: bool) -> int:
    """Requests of one sweep from an empty store."""
    with S3Server() as server, tempfile.TemporaryDirectory() as out:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | server.environment
        where = ["--address", "local", "--storage", f"s3://{BUCKET}/storage", "--out", out]
        done = subprocess.run(
            [sys.executable, *COMMAND, *where, *arguments],
            cwd=checkout,
            env=environment | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{checkout}: the sweep ended with {done.returncode}\n{done.stdout}{done.stderr}")
        total = server.requests.total()
        print(f"{checkout}: {total} requests: {dict(server.requests.most_common())}", flush=True)
        for path, number in server.paths.most_common(NUM_SHOWN if show_paths else 0):
            print(f"  {number:5}  {path}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", type=Path, required=True, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--paths", action="store_true", help="also what was asked for most")
    parser.add_argument("arguments", nargs="*", help="further arguments of ablate.py, after --")
    arguments = parser.parse_args()
    ours, theirs = (count(c, arguments.arguments, arguments.paths) for c in (ROOT, arguments.rival.resolve()))
    report("s3_requests", ours, theirs, "requests")


if __name__ == "__main__":
    main()
