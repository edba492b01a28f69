"""`predict` and `label` that are stopped: what lies in --out then, and what the same command makes of it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cast_ray
from cast_ray.cli import label, predict
from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from cast_ray.cli.unfinished import JOURNAL
from cast_ray.common.files import PARTIAL
from cast_ray.contracts.records import Category
from cast_ray.inference.predictor import Predictor
from cast_ray.inference.result_files import JsonList, check_results
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, ModelConfig

NUM_PHOTOS = 7
FILES = {"predict": ("results.json", "images.json"), "label": ("instances.json",)}
MODEL_FLAG = {"predict": "--student", "label": "--teacher"}
MAIN = {"predict": predict.main, "label": label.main}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2)
    config = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=5, num_layers=1, feedforward_dim=16)
    folder = tmp_path_factory.mktemp("student")
    Student(build_segmenter(config, 2, 0), [Category(5, "disc"), Category(9, "bar")], (32, 48)).save_pretrained(folder)
    return folder


def draw_photo(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24 + seed % 10, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos 0 to 6 and, between them, a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUM_PHOTOS):
        draw_photo(folder / f"{i}.png", i)
    (folder / "2b.png").write_bytes(b"no photo")
    return folder


@dataclass
class Command:
    """One of the two commands over the photos; `read` is filled with the names of the images that its model saw."""

    name: str
    photos: Path
    student: Path
    read: list[str] = field(default_factory=list)

    def arguments(self, out: Path, *options: object) -> list[str]:
        flags = (MODEL_FLAG[self.name], self.student, "--threshold", 0, "--batch", 2)
        return [str(a) for a in (self.photos, *flags, "--out", out, *options)]

    def run(self, out: Path, *options: object) -> int:
        self.read.clear()
        return MAIN[self.name](self.arguments(out, *options))

    def results(self, out: Path) -> dict[str, Any]:
        return {name: parse((out / name).read_bytes()) for name in FILES[self.name]}


@pytest.fixture(params=["predict", "label"])
def command(request: pytest.FixtureRequest, photos: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    command = Command(request.param, photos, student)
    work = Predictor.__call__

    def noted(self: Predictor, paths: Sequence[str]) -> list[dict[str, Any]]:
        command.read += [Path(path).name for path in paths]
        return work(self, paths)

    monkeypatch.setattr(Predictor, "__call__", noted)
    return command


Stop = Callable[[int | None], None]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    """`stop_after(n)`: Ctrl-C while the images after the first n batches are worked on; `stop_after(None)`: never."""
    work = Predictor.__call__
    left: list[int | None] = [None]

    def stopped(self: Predictor, paths: Sequence[str]) -> list[dict[str, Any]]:
        if left[0] == 0:
            raise KeyboardInterrupt
        if left[0] is not None:
            left[0] -= 1
        return work(self, paths)

    def stop(num_batches: int | None) -> None:
        left[0] = num_batches

    monkeypatch.setattr(Predictor, "__call__", stopped)
    yield stop


def parse(content: bytes) -> Any:
    """JSON with scores to five digits: the images that pass a model together decide how its sums are rounded."""
    return json.loads(content, parse_float=lambda number: round(float(number), 5))


def everything(folder: Path) -> dict[str, Any]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: parse(content) if name.endswith(".json") else content for name, content in files.items()}


def test_a_stopped_command_resumes_with_the_missing_images(
    command: Command, tmp_path: Path, stop_after: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(tmp_path / "whole") == 0
    out = tmp_path / "out"
    stop_after(2)
    assert command.run(out) == EXIT_INTERRUPTED
    assert "the same command resumes with the images that are not finished" in capsys.readouterr().err
    assert not any((out / name).exists() for name in FILES[command.name])
    assert (out / JOURNAL).is_file() and len(list((out / "overlays").iterdir())) == 3

    stop_after(None)
    assert command.run(out) == 0
    written = capsys.readouterr()
    assert "resumed: 3 of 8 images are finished" in written.err and "7 of 8 images" in written.out
    assert "2b.png" in written.err  # a bad image is tried, and reported, again
    assert command.read == ["2b.png", "3.png", "4.png", "5.png", "6.png"]
    assert everything(out) == everything(tmp_path / "whole")


def test_a_killed_command_resumes(command: Command, tmp_path: Path) -> None:
    assert command.run(tmp_path / "whole") == 0
    out = tmp_path / "out"
    script = f"""
import os, sys
from cast_ray.cli import {command.name}
from cast_ray.cli.unfinished import FinishedImages
add, left = FinishedImages.add, [3]
def killed(self, row):
    left[0] -= 1
    if left[0] < 0:
        self._file.write(b'{{"path": "half of a li')
        self._file.flush()
        os.kill(os.getpid(), 9)
    add(self, row)
FinishedImages.add = killed
{command.name}.main(sys.argv[1:])
"""
    started = [sys.executable, "-c", script, *command.arguments(out)]
    done = subprocess.run(started, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / JOURNAL).read_text().endswith("half of a li")
    (out / f".{FILES[command.name][0]}.12345678{PARTIAL}").write_text("[")  # killed while it wrote the results

    assert command.run(out) == 0
    assert command.read == ["2b.png", "3.png", "4.png", "5.png", "6.png"]
    assert everything(out) == everything(tmp_path / "whole")


def test_a_finished_folder_stays_whole_until_the_new_results_are(
    command: Command, tmp_path: Path, stop_after: Stop
) -> None:
    out = tmp_path / "out"
    assert command.run(out) == 0
    before = command.results(out)
    stop_after(3)
    assert command.run(out, "--threshold", 0.3) == EXIT_INTERRUPTED
    assert command.results(out) == before
    stop_after(None)
    assert command.run(out, "--threshold", 0.3) == 0
    assert len(json.dumps(command.results(out))) < len(json.dumps(before))


def test_nothing_is_kept_of_a_command_that_finished(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command.run(out) == 0
    assert not (out / JOURNAL).exists()
    assert command.run(out) == 0
    assert len(command.read) == NUM_PHOTOS + 1


@pytest.mark.parametrize("content", [b'{"info": {"description": "mine"}, "images": []}', b"[]", b"", b"no JSON"])
def test_files_of_something_else_are_not_replaced(
    command: Command, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES[command.name]:
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(content)
        (out / "notes.txt").touch()
        assert command.run(out) == EXIT_BAD_INPUT and command.read == []
        line = capsys.readouterr().err.splitlines()[-1]
        what = f"results of `cast-ray {command.name}`"
        assert line.startswith(f"error: {out} holds something other than {what} ({name}): expected another folder")
        assert {path.name for path in out.iterdir()} == {name, "notes.txt"} and (out / name).read_bytes() == content
    drawn = tmp_path / "drawn" / "overlays" / "2.png"
    drawn.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(drawn)
    before = drawn.read_bytes()
    assert command.run(drawn.parents[1]) == EXIT_BAD_INPUT and command.read == []
    assert "holds something other than overlays of cast-ray (overlays/2.png)" in capsys.readouterr().err
    assert drawn.read_bytes() == before and list(drawn.parents[1].iterdir()) == [drawn.parent]
    assert command.run(drawn.parents[1], "--no-overlays") == 0 and drawn.read_bytes() == before
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "notes.txt").touch()  # a folder of one's own takes the results, as long as nothing is replaced
    for _ in range(2):
        assert command.run(beside) == 0


def test_results_say_who_has_written_them(command: Command, tmp_path: Path) -> None:
    assert command.run(tmp_path) == 0
    info = json.loads((tmp_path / FILES[command.name][-1]).read_bytes())["info"]
    assert Path(info.pop("folder")).is_dir()  # of the images, which file names are relative to
    assert info == {"description": f"cast_ray {command.name}", "version": cast_ray.__version__}
    other = {"predict": "label", "label": "predict"}[command.name]
    check_results(tmp_path, command.name)  # type: ignore[arg-type]
    check_results(tmp_path, other)  # type: ignore[arg-type]


def test_an_image_that_has_changed_or_is_new_is_not_finished(
    command: Command, tmp_path: Path, stop_after: Stop
) -> None:
    out = tmp_path / "out"
    stop_after(2)
    assert command.run(out) == EXIT_INTERRUPTED
    draw_photo(command.photos / "1.png", 11)
    draw_photo(command.photos / "0b.png", 12)
    stop_after(None)
    assert command.run(out) == 0
    assert command.read == ["0b.png", "1.png", "2b.png", "3.png", "4.png", "5.png", "6.png"]
    assert command.run(tmp_path / "whole") == 0
    assert everything(out) == everything(tmp_path / "whole")


def test_other_settings_do_not_mix_with_an_unfinished_run(
    command: Command, tmp_path: Path, stop_after: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stop_after(2)
    assert command.run(out) == EXIT_INTERRUPTED
    kept = everything(out)
    stop_after(None)
    capsys.readouterr()
    assert command.run(out, "--threshold", 0.5) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "an unfinished run with other settings lies there (threshold: 0.0, now 0.5" in line
    assert f"delete {out / JOURNAL} to start anew" in line
    assert everything(out) == kept
    # how the work is done may differ
    assert command.run(out, "--batch", 3) == 0


def test_a_run_that_finished_no_image_binds_nobody(command: Command, tmp_path: Path, stop_after: Stop) -> None:
    out = tmp_path / "out"
    stop_after(0)
    assert command.run(out) == EXIT_INTERRUPTED
    assert everything(out) == {}
    stop_after(None)
    assert command.run(out, "--threshold", 0.1) == 0


def test_other_weights_are_other_settings(
    command: Command, tmp_path: Path, stop_after: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2)
    assert command.run(tmp_path / "out") == EXIT_INTERRUPTED
    stop_after(None)
    student = Student.from_pretrained(command.student)
    next(student.segmenter.parameters()).data.add_(1)
    student.save_pretrained(tmp_path / "retrained")
    other = Command(command.name, command.photos, tmp_path / "retrained")
    assert other.run(tmp_path / "out") == EXIT_BAD_INPUT
    assert "weights" in capsys.readouterr().err


def test_two_processes_do_not_write_to_one_folder(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / JOURNAL).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert command.run(out) == EXIT_BAD_INPUT
    assert f"--out {out}: another process is writing its results there" in capsys.readouterr().err


@pytest.mark.parametrize("where", [".", "found"])
def test_a_command_does_not_read_its_own_overlays(command: Command, where: str, stop_after: Stop) -> None:
    out = command.photos / where
    assert command.run(out) == 0
    first = command.results(out)
    assert len(list((out / "overlays").iterdir())) == NUM_PHOTOS
    assert command.run(out) == 0 and command.results(out) == first
    stop_after(2)
    assert command.run(out) == EXIT_INTERRUPTED
    stop_after(None)
    assert command.run(out) == 0 and command.results(out) == first
    assert len(list((out / "overlays").iterdir())) == NUM_PHOTOS


def test_overlays_that_are_named_themselves_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command.photos
    assert command.run(out) == 0
    capsys.readouterr()
    command.photos = out / "overlays" / "0.png"
    assert command.run(out) == EXIT_BAD_INPUT
    assert "overlays is not read" in capsys.readouterr().err
    command.photos = out / "overl*" / "*.png"
    monkeypatch.chdir(out)
    assert command.run(Path(".")) == EXIT_BAD_INPUT
    command.photos = out / "**" / "*.png"
    assert command.run(Path(".")) == 0
    assert len(command.read) == NUM_PHOTOS + 1


def test_a_list_whose_writing_failed_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="disk"), path.open("w") as file, JsonList(file) as elements:
        elements.add(1)
        raise OSError("disk full")
    with pytest.raises(ValueError):
        json.loads(path.read_text())


def test_results_that_cannot_be_written_are_tried_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr("cast_ray.common.files.os.replace", full)
        with pytest.raises(OSError, match="disk full"):
            command.run(out)
    assert not any((out / name).exists() for name in FILES[command.name])
    assert not list(out.glob(f".*{PARTIAL}"))
    assert command.run(out) == 0
    assert command.read == ["2b.png"]


def test_a_journal_of_no_use_is_written_anew(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL).write_bytes(os.urandom(40))
    assert command.run(out) == 0
    assert len(command.read) == NUM_PHOTOS + 1
