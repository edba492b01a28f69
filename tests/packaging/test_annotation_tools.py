"""`cast-ray annotate` there and back through the tools' own libraries, each in a virtual environment of its own.

The libraries are large, and one of them brings another OpenCV: they are no dependency of the tests. What they wrote is
kept in `tests/data/annotation_tools`, on which the quick tests run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import annotation_scenes
import pytest

from cast_ray.cli.main import main

HELPER = Path(__file__).parents[1] / "helpers/annotation_tools.py"
LIBRARIES = {"cvat": "datumaro==1.13.12", "label-studio": "label-studio-sdk", "yolo": "supervision==0.31.2"}


def python_with(library: str, folder: Path) -> Path:
    """A Python with a library and all that the tests have; skips the test where it cannot be installed."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin/python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"{library} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", LIBRARIES)
def test_the_library_of_each_tool_reads_and_writes_what_is_exported(tmp_path: Path, tool: str) -> None:
    python = python_with(LIBRARIES[tool], tmp_path / "venv")
    labels, exported, out = annotation_scenes.write_labels(tmp_path), tmp_path / "to", tmp_path / "out"
    out.mkdir()
    assert main(["annotate", "export", str(labels), "--to", tool, "--out", str(exported)]) == 0
    command = list(map(str, (python, HELPER, tool, exported, out)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    came = out / ("export.json" if tool == "label-studio" else "export")
    back = tmp_path / "back"
    assert main(["annotate", "import", str(came), "--against", str(exported), "--out", str(back)]) == 0
    found = json.loads((back / "import.json").read_text())["counts"]
    kind = "with an outline within 1 pixel" if tool == "yolo" else "unchanged"
    edits = {"with a changed mask": 1, "of a changed class": 1, "added": 1, "deleted": 1}
    assert {name: number for name, number in found.items() if number} == {kind: 2, **edits}
