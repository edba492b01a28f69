"""Arguments that no command can use: one line that names the argument and what it expects, before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cast_ray.cli import ablate, efficiency, export, inspect, label, predict, report, search, store
from cast_ray.cli.options import EXIT_BAD_INPUT, plain_console

STUDENT = ["photos", "--student", "gone", "--out", "out"]
TEACHER = ["photos", "--teacher", "gone", "--out", "out"]
PRICE = "a price such as 1.2 or A10G=1.01"
WORKERS = "a whole number, 1 or more, or the least and the most workers such as 1:8"
WHOLE, SEED, POSITIVE, SHARE, AMOUNT = (
    "a whole number from 0 on",
    "a whole number from 0 on and below 2^63",
    "a whole number, 1 or more",
    "a number from 0 to 1",
    "a number from 0 on",
)

NUMBERS: list[tuple[Callable[[list[str]], int], list[str], str, str, list[str]]] = [
    (predict.main, STUDENT, "--threshold", SHARE, ["1.1", "-0.1", "nan", "high"]),
    (predict.main, STUDENT, "--max-detections", POSITIVE, ["0", "-5", "1.5"]),
    (predict.main, STUDENT, "--batch", POSITIVE, ["0", "-1", "x"]),
    (predict.main, STUDENT, "--workers", WHOLE, ["-1", "all"]),
    (label.main, TEACHER, "--threshold", SHARE, ["1.1", "-1"]),
    (label.main, TEACHER, "--batch", POSITIVE, ["0"]),
    (label.main, TEACHER, "--workers", WHOLE, ["-2"]),
    (export.main, ["--student", "gone", "--out", "s.onnx"], "--max-detections", POSITIVE, ["0", "-5"]),
    (inspect.main, ["data"], "--images", POSITIVE, ["0", "-1"]),
    (ablate.main, ["losses"], "--seeds", SEED, ["-1", "true", str(2**63)]),
    (ablate.main, ["losses"], "--num-cpus", POSITIVE, ["0", "-2"]),
    (ablate.main, ["losses"], "--max-concurrent", WHOLE, ["-1"]),
    (ablate.main, ["losses"], "--workers-per-trial", WORKERS, ["0", "0:2", "3:2", "1:", ":"]),
    (ablate.main, ["losses"], "--budget-hours", AMOUNT, ["-1", "nan", "inf"]),
    (ablate.main, ["losses"], "--price-per-gpu-hour", PRICE, ["-1", "nan", "A10G=", "A10G=-1", "=2"]),
    (efficiency.main, [], "--batch", POSITIVE, ["0"]),
    (efficiency.main, [], "--repeats", POSITIVE, ["0"]),
    (report.main, ["runs/x"], "--price-per-gpu-hour", PRICE, ["A10G=cheap"]),
    (report.main, ["runs/x"], "--every", "a number above 0", ["0", "-1", "nan"]),
    (search.main, ["losses"], "--trials", POSITIVE, ["0"]),
    (search.main, ["losses"], "--seed", SEED, ["-1", str(2**63)]),
    (search.main, ["losses"], "--num-cpus", POSITIVE, ["0"]),
    (search.main, ["losses"], "--max-concurrent", WHOLE, ["-1"]),
    (search.main, ["losses"], "--workers-per-trial", WORKERS, ["-1"]),
    (search.main, ["losses"], "--budget-hours", AMOUNT, ["-0.5"]),
]


def refusal(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses its arguments."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("main", "arguments", "flag", "expected", "value"),
    [(*case, value) for *case, values in NUMBERS for value in values],
)
def test_numbers_out_of_range(
    main: Callable[[list[str]], int],
    arguments: list[str],
    flag: str,
    expected: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(main, [*arguments, f"{flag}={value}"], capsys)
    assert line.startswith(f"error: argument {flag}: expected {expected}, got '{value}' (see ")
    assert list(tmp_path.iterdir()) == []


EMPTY: list[tuple[Callable[[list[str]], int], list[str], str]] = [
    *((main, ["losses"], flag) for main in (ablate.main, search.main) for flag in ("--out", "--storage", "--set")),
    (ablate.main, ["losses"], "--mlflow"),
    (ablate.main, ["losses"], "--preset"),
    (search.main, ["losses"], "--study"),
    (store.main, ["ls"], "--storage"),
    (predict.main, ["photos", "--student", "gone"], "--out"),
    (predict.main, ["photos", "--out", "out"], "--student"),
    (label.main, ["photos", "--teacher", "gone"], "--out"),
    (export.main, ["--student", "gone"], "--out"),
    (inspect.main, ["data"], "--out"),
    (efficiency.main, [], "--out"),
]


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize(("main", "arguments", "flag"), EMPTY)
def test_an_empty_value_is_refused(
    main: Callable[[list[str]], int],
    arguments: list[str],
    flag: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(main, [*arguments, flag, value], capsys)
    assert line.startswith(f"error: argument {flag}: expected a value, got '{value}' (see ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "arguments", "setting", "flag"),
    [
        (ablate.main, ["losses"], "scale=full", "--scale full"),
        (ablate.main, ["losses"], "preset=coco", "--preset coco"),
        (ablate.main, ["losses"], "seeds=3", "--seeds 3"),
        (ablate.main, ["losses"], "rows=sup", "--rows sup"),
        (ablate.main, ["losses"], "storage=/mnt/s", "--storage /mnt/s"),
        (ablate.main, ["losses"], "num_cpus=2", "--num-cpus 2"),
        (ablate.main, ["losses"], "dry-run=true", "--dry-run true"),
        (search.main, ["losses"], "seed=3", "--seed 3"),
        (search.main, ["losses"], "trials=3", "--trials 3"),
        (label.main, TEACHER, "classes=car", "--classes car"),
        (inspect.main, ["data"], "format=coco", "--format coco"),
        (efficiency.main, [], "rows=paper", "--rows paper"),
    ],
)
def test_an_option_given_as_a_recipe_key(
    main: Callable[[list[str]], int],
    arguments: list[str],
    setting: str,
    flag: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(main, [*arguments, "--set", setting], capsys)
    key = setting.partition("=")[0]
    assert line.startswith(f"error: argument --set: {key} is no recipe key: expected {flag} (see ")


OUT_FOLDER: list[tuple[Callable[[list[str]], int], list[str]]] = [
    (predict.main, ["photos", "--student", "gone"]),
    (label.main, ["photos", "--teacher", "gone"]),
    (export.main, ["--student", "gone"]),
    (ablate.main, ["losses"]),
    (search.main, ["losses"]),
]


@pytest.mark.parametrize(("main", "arguments"), OUT_FOLDER)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "--out file: expected a folder, file is a file"),
        ("file/new", "--out file/new: expected a folder, {}/file is a file"),
        ("gopher://bucket/out", "--out gopher://bucket/out: "),
    ],
)
def test_an_output_folder_that_cannot_be(
    main: Callable[[list[str]], int],
    arguments: list[str],
    out: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main([*arguments, "--out", out]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message.format(tmp_path)}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("main", "name"), [(ablate.main, "losses-shapes-smoke"), (search.main, "mine")])
def test_a_run_whose_folder_is_a_file(
    main: Callable[[list[str]], int],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / name).write_text("mine")
    assert main(["losses", "--scale", "smoke", "--name", name]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: --out runs/{name}: expected a folder, runs/{name} is a file"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and (tmp_path / "runs" / name).read_text() == "mine"


def test_markup_and_emoji_codes_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    for stderr in (False, True):
        plain_console(stderr=stderr).print("[bold]a[/bold] [/red] :car:", soft_wrap=True)
    written = capsys.readouterr()
    assert written.out == written.err == "[bold]a[/bold] [/red] :car:\n"


def test_what_only_an_onnx_model_has_is_refused_with_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in (["--image-px", "64", "96"], ["--max-detections", "5"]):
        assert export.main(["--student", "gone", "--out", "folder", *option]) == EXIT_BAD_INPUT
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line == f"error: {' '.join(option)}: expected --out FILE.onnx or FILE.xml with it, got 'folder'"


def test_an_output_file_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    for out, message in (
        ("folder.onnx", "expected a file, found a folder"),
        ("s3://bucket/s.onnx", "expected a local path"),
    ):
        for main, arguments in ((export.main, ["--student", "gone"]), (efficiency.main, ["--count-only"])):
            assert main([*arguments, "--out", out]) == EXIT_BAD_INPUT
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith(f"error: --out {out}: {message}")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert export.main(["--student", "gone", "--out", str(tmp_path / "new")]) == EXIT_BAD_INPUT
    assert f"the folder {tmp_path} cannot be written" in capsys.readouterr().err
