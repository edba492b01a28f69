"""Counting and timing models, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cast_ray.cli import efficiency
from cast_ray.cli.options import EXIT_BAD_INPUT
from cast_ray.evaluation.efficiency import count_gmacs, count_parameters, measure_seconds, peak_memory

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(images.float()).mean((2, 3)))


def test_counts_of_a_model_one_can_count_by_hand() -> None:
    with torch.device("meta"):
        small = Small()
    assert count_parameters(small) == 3 * 8 * 9 + 8 + 8 * 5 + 5
    images = torch.empty(2, 3, 10, 20, dtype=torch.uint8, device="meta")
    assert count_gmacs(small, images) == pytest.approx(2 * (200 * 3 * 8 * 9 + 8 * 5) / 1e9)


def test_the_median_is_taken_after_warming_up() -> None:
    calls: list[bool] = []

    def run() -> None:
        calls.append(torch.is_inference_mode_enabled())

    assert measure_seconds(run, CPU, repeats=3) >= 0
    assert calls == [True] * 5


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    before = torch.ones(1000)

    def run() -> torch.Tensor:
        first = torch.ones(400, dtype=torch.uint8)  # 400
        second = first.view(2, -1) + 1  # 800
        del first  # 400
        third = second.float()  # 2000
        del second  # 1600
        before.view(2, -1).mul_(1)  # was there before
        return third.view(-1)[:10] + before[0]  # 1640

    assert [peak_memory(run, CPU) for _ in range(2)] == [2000, 2000]


def test_the_command_counts_full_size_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.json"
    arguments = ["--count-only", "--rows", "dinov2-s", "released", "eomt", "--out", str(out)]
    assert efficiency.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "paper: student" in printed and "568" in printed and "350.87" in printed
    rows = {row["row"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["dinov2-s"]["params_m"] == pytest.approx(53.1, abs=0.1)  # the paper: 52
    assert rows["released"]["params_m"] == pytest.approx(77.9, abs=0.1)
    assert rows["released"]["gmacs"] > rows["dinov2-s"]["gmacs"]
    assert rows["eomt"]["gmacs"] < 0.6 * rows["dinov2-s"]["gmacs"]
    assert rows["eomt"]["latency_ms"] is None and "teacher" not in rows


def test_the_papers_teacher_stands_beside_its_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert efficiency.main(["--count-only", "--rows", "teacher", "dinov2-s"]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {line[1].strip(): line[2:4] for line in lines}
    assert int(cells["teacher"][0]) == pytest.approx(568, rel=0.02)  # the paper's
    ours, theirs = (float(cells[f"{who}teacher : student"][0].strip(" x")) for who in ("", "paper: "))
    assert ours == pytest.approx(theirs, rel=0.05) and theirs == 10.9


def test_the_command_times_small_ones(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--scale", "smoke", "--rows", "dinov2-s", "--set", "data.image_px=[28, 28]", "--repeats", "1"]
    assert efficiency.main([*small, "--batch", "2", "--device", "cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "dinov2-s " in line)
    latency, rate = (float(cell) for cell in line.split("│")[4:6])
    assert latency > 0 and rate > 0


@pytest.mark.parametrize(
    "arguments", [["--rows", "dino"], ["--set", "student.head=none"], ["--device", "cuda:7"], ["--device", "me"]]
)
def test_mistakes_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda:7" in arguments and torch.cuda.is_available():
        return
    assert efficiency.main(arguments) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: ")
