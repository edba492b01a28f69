"""A folder through two workers of a Ray of its own gives what one process gives, also after a run that was killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_students import TINY

from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and 40 photos, every tenth of which is none."""
    folder = tmp_path_factory.mktemp("predict")
    Student(build_segmenter(TINY, 2, 0), [Category(1, "a"), Category(2, "b")], (32, 32)).save_pretrained(folder / "s")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / "photos" / f"{i:02}.png"
        if i % 10 == 0:
            path.write_bytes(b"no photo")
        else:
            Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)).save(path)
    return folder


KILLED_AFTER_12 = """
import os, sys
from cast_ray.cli import predict, unfinished
add, left = unfinished.FinishedImages.add, [12]
def killed(self, row):
    add(self, row)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
unfinished.FinishedImages.add = killed
predict.main(sys.argv[1:])
"""


def predict(
    folder: Path, out: str, *options: str, start: tuple[str, ...] = ("-m", "cast_ray", "predict"), **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *start, str(folder / "photos"), "--student", str(folder / "s")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    environment |= variables
    return subprocess.run(
        [*command, "--out", str(folder / out), "--threshold", "0", "--batch", "3", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_workers_give_what_one_process_gives(folder: Path) -> None:
    alone = predict(folder, "alone")
    killed = predict(folder, "workers", start=("-c", KILLED_AFTER_12))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    long = folder / (100 * "x")  # longer than a path of Ray's sockets may be
    long.mkdir()
    workers = predict(folder, "workers", "--workers", "2", "--address", "local", TMPDIR=str(long))
    assert "resumed: 12 of 40 images are finished" in workers.stderr
    for done in (alone, workers):
        assert done.returncode == 0, done.stderr
        assert "36 of 40 images" in done.stdout and "skipped" in done.stderr and "30.png" in done.stderr
    for name in ("results.json", "images.json"):
        # Scores to five digits: the images that pass a model together decide how its sums are rounded.
        one, two = (
            json.loads((folder / out / name).read_text(), parse_float=lambda number: round(float(number), 5))
            for out in ("alone", "workers")
        )
        assert one == two
    for path in (folder / "alone" / "overlays").iterdir():
        assert path.read_bytes() == (folder / "workers" / "overlays" / path.name).read_bytes()


def test_more_workers_than_the_machine_has_are_refused(folder: Path) -> None:
    done = predict(folder, "refused", "--workers", "4000", "--address", "local")
    assert done.returncode == 2 and "--workers 4000: this Ray has room for" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_of_no_ray_is_refused_in_one_line(folder: Path) -> None:
    with socket.socket() as nobody:  # bound and not listening: refuses
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = predict(folder, "refused", "--workers", "1", RAY_ADDRESS=address)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("images")]  # the progress bar
    assert line.startswith(f"error: RAY_ADDRESS {address}: no Ray answers there")
    assert not (folder / "refused" / "results.json").exists()
