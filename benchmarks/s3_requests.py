"""Requests that a smoke sweep of two rows sends to an object store, against an older checkout.

    python benchmarks/s3_requests.py --rival ../older-checkout

Each checkout runs the same command, `ablate.py losses --rows sup sup+semi --scale smoke` on drawn scenes, in processes
of its own, with `s3://` as storage: an S3-compatible server on loopback (moto's) counts what arrives. Every request is
paid for and takes tens of milliseconds on a real object store. With --paths, what was asked for most: first by kind of
file, then by path.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
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
        if show_paths:
            for counted in (kinds_of(server.paths), server.paths):
                for path, number in counted.most_common(NUM_SHOWN):
                    print(f"  {number:5}  {path}")
                print()
    return total


def kinds_of(paths: Counter[str]) -> Counter[str]:
    """Requests by kind and folder of the store, of artifacts by their files' names."""
    kinds: Counter[str] = Counter()
    for path, number in paths.items():
        kind, _, name = path.partition(" ")
        parts = name.strip("/").split("/")[2:]
        kinds[" ".join([kind, *parts[:1], *(parts[-1:] if parts[:1] == ["artifacts"] else [])])] += number
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--paths", action="store_true", help="also what was asked for most")
    parser.add_argument("arguments", nargs="*", help="further arguments of ablate.py, after --")
    arguments = parser.parse_args()
    ours = count(ROOT, arguments.arguments, arguments.paths)
    if arguments.rival is not None:
        theirs = count(arguments.rival.resolve(), arguments.arguments, arguments.paths)
        report("s3_requests", ours, theirs, "requests")


if __name__ == "__main__":
    main()
