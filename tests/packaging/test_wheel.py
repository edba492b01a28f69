"""The wheel away from the checkout: the command, its tables and the report's page come along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cast_ray.common.version import VERSION

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "cast_ray", "sweeps")
TINY = ["data.shapes.num_source=8", "data.shapes.num_train=12", "data.shapes.num_val=4"]


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=600, check=False
    )


def pip(*arguments: str, cwd: Path) -> None:
    done = run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout, built from a copy: what an earlier build left in the checkout is not packed."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel; its dependencies are those of the tests.

    It lies in a git repository of something else, as a virtual environment often does.
    """
    folder = tmp_path_factory.mktemp("site")
    for command in (["init"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "--allow-empty", "-m", "x"]):
        assert run("git", *command, cwd=folder).returncode == 0
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "cast-ray = cast_ray.cli.main:main" in archive.read(metadata).decode()
    files = (p for p in (ROOT / "cast_ray").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {f"cast_ray/tables/{path.name}" for path in (ROOT / "sweeps" / "tables").glob("*.yaml")}
    expected |= {f"cast_ray/searches/{path.name}" for path in (ROOT / "sweeps" / "search").glob("*.yaml")}
    assert packed == expected


@pytest.mark.timeout(1200)
def test_the_installed_command_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def cast_ray(*arguments: str) -> str:
        variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        done = run(sys.executable, str(installed / "bin" / "cast-ray"), *arguments, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import cast_ray; print(cast_ray.__file__)"
    found = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert found.strip() == str(installed / "cast_ray" / "__init__.py")

    small = ["--scale", "smoke", *(part for setting in TINY for part in ("--set", setting))]
    dry = cast_ray("ablate", "losses", "--preset", "shapes", "--dry-run", *small)
    assert "What each loss term is worth" in dry and "30 unique of 38" in dry
    assert "losses" in cast_ray("search", "--help") and list(tmp_path.glob("runs/*")) == []

    cast_ray("ablate", "losses", "--preset", "shapes", "--rows", "sup", "--address", "local", *small)
    run_folder = Path("runs") / "losses-shapes-smoke"
    assert (tmp_path / "storage").is_dir() and (tmp_path / run_folder / "losses__sup__s0" / "result.json").is_file()
    result = json.loads((tmp_path / run_folder / "losses__sup__s0" / "result.json").read_text())
    assert result["code_version"] == VERSION and result["command"].startswith("cast-ray ablate losses --preset shapes")
    (tmp_path / run_folder / "report.html").unlink()
    shutil.rmtree(tmp_path / "storage")  # a report is made from the run folder alone
    printed = cast_ray("report", str(run_folder))
    assert "report.html" in printed and "<title>" in (tmp_path / run_folder / "report.html").read_text()
