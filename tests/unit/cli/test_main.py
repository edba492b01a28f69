"""The command `cast-ray`: its first page, its commands, and the public names of the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cast_ray
from cast_ray.cli.main import COMMANDS, OPTIONS, help_text, main
from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_CODES, exit_codes_text
from cast_ray.runtime.sweep.planner import command_line

ROOT = Path(__file__).parents[3]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user does, with this checkout on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_first_page_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem for path in (ROOT / "cast_ray" / "cli").glob("*.py")}
    assert set(COMMANDS) <= files
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        page = capsys.readouterr().out
        for name, sentence in COMMANDS.items():
            assert f"  {name:<12}{sentence}\n" in page
        assert all(f"  {code:<5}{meaning}\n" in page for code, meaning in EXIT_CODES.items())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cast_ray {cast_ray.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("ablat", "ablate"), ("stores", "store"), ("exprot", "export")],
)
def test_an_unknown_command_names_the_nearest_first(
    typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed, "losses"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: unknown command '{typed}': expected one of {nearest}, ")
    assert all(name in line for name in COMMANDS)


@pytest.mark.parametrize("typed", ["-x", "--exprot", "-", "--ablate"])
def test_an_unknown_option_is_told_the_options(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed, "losses"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    named = ", ".join(OPTIONS)
    assert line == f"error: unknown option '{typed}': expected a command, or one of {named} (see cast-ray --help)"
    assert all(f"  {option} " in help_text() or f", {option} " in help_text() for option in OPTIONS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: cast-ray {name} ")
    assert exit_codes_text() in text
    with pytest.raises(SystemExit) as exit:
        main([name, "--no-such-option"])
    assert exit.value.code == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f"(see cast-ray {name} --help)")


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a Python process has loaded after `code`."""
    code = (
        f"import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
        "print(*({'torch', 'ray', 'transformers', 'scipy', 'matplotlib', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_first_page_and_the_package_are_light() -> None:
    assert loaded_by("from cast_ray.cli.main import main; main(['--help'])") == set()
    assert loaded_by("import cast_ray; dir(cast_ray)") == set()
    assert loaded_by("from cast_ray import Recipe, build_recipe; build_recipe('shapes')") == {"pydantic"}


def test_explaining_a_command_loads_nothing_heavy() -> None:
    code = "from cast_ray.cli.main import COMMANDS, main\n    for name in COMMANDS:\n"
    code += "        with contextlib.suppress(SystemExit):\n            main([name, '--help'])"
    assert loaded_by(code) == {"pydantic"}


def test_public_names_are_what_they_say() -> None:
    from cast_ray.evaluation import matches
    from cast_ray.models import student

    assert set(cast_ray.__all__) <= set(dir(cast_ray))
    for name in set(cast_ray.__all__) - {"__version__"}:
        found = getattr(cast_ray, name)
        assert found.__name__ == name and found.__doc__
    assert cast_ray.Student is student.Student and cast_ray.load_matches is matches.load_matches
    with pytest.raises(AttributeError, match="no attribute 'Teacher'"):
        cast_ray.Teacher  # noqa: B018


@pytest.mark.parametrize(
    ("start", "former", "name"),
    [
        (["-m", "cast_ray.predict"], "python -m cast_ray.predict", "predict"),
        (["-m", "cast_ray.label"], "python -m cast_ray.label", "label"),
        (["-m", "cast_ray.export"], "python -m cast_ray.export", "export"),
        (["-m", "cast_ray.datasets", "inspect"], "python -m cast_ray.datasets inspect", "inspect"),
        (["-m", "cast_ray.datasets"], "python -m cast_ray.datasets inspect", "inspect"),
    ],
)
def test_former_names_work_and_say_the_present_one(start: list[str], former: str, name: str) -> None:
    done = python(*start, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: cast-ray {name} ")
    assert done.stderr == f"note: `{former}` is now `cast-ray {name}`\n"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (["sweeps/ablate.py"], "ablate"),
        (["sweeps/ablate.py", "report"], "report"),
        (["sweeps/ablate.py", "store"], "store"),
        (["sweeps/ablate.py", "efficiency"], "efficiency"),
        (["sweeps/search.py"], "search"),
        (["-m", "cast_ray", "export"], "export"),
    ],
)
def test_files_of_a_checkout_start_the_same_commands(start: list[str], name: str, tmp_path: Path) -> None:
    where = [str(ROOT / word) if word.endswith(".py") else word for word in start]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if start[0] == "-m":
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *where, "--help"]  # from elsewhere, as a Ray job may, and not installed
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: cast-ray {name} ") and done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/env/bin/cast-ray", "ablate", "a b"], "cast-ray ablate 'a b'"),
        (["/src/cast_ray/__main__.py", "store", "gc"], "python -m cast_ray store gc"),
        (["sweeps/ablate.py", "losses"], "python sweeps/ablate.py losses"),
    ],
)
def test_results_name_the_command_as_it_was_typed(argv: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == typed
