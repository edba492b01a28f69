"""The house's import rules: arrows point one way, no circle, light rooms stay light, Ray stays at home."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cast_ray.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
# Low to high; a module may import modules of lower layers and of its own room. A room is `cast_ray/<name>/`, and in
# `runtime/` each folder and file is a room of its own.
LAYERS = [
    ("common",),
    ("recipe",),
    ("contracts",),
    ("data", "models", "losses", "evaluation"),
    ("teachers",),
    ("engine",),
    ("plan",),
    ("runtime.process_settings", "runtime.ray_internals", "runtime.shared_paths", "runtime.metrics"),
    ("runtime.this_node",),
    ("runtime.cluster",),
    ("runtime.placement",),
    ("runtime.store",),
    ("runtime.data",),
    ("runtime.worker",),
    ("runtime.sweep",),
    ("runtime.search",),
    ("report",),
    ("publish",),
    ("inference",),
    ("annotation",),
    ("cli",),
    ("__main__", "predict", "label", "export", "datasets"),  # `python -m cast_ray.predict` and the like start cli
    ("sweeps",),
]
LAYER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# The report is made from files alone: it uses what it is given, and nothing that reads a store.
REPORT_MAY_USE = {"report", "common", "recipe", "contracts", "data", "models", "evaluation", "plan"}
RAY_AT_HOME = {"runtime"}
ARGPARSE_AT_HOME = {"cli"}
DISTRIBUTED_AT_HOME = {"engine", "runtime.worker"}
LIGHT = [
    "cast_ray.runtime.sweep.run",
    "cast_ray.runtime.search.run",
    "cast_ray.runtime.store.claims",
    "cast_ray.plan.search",
    "cast_ray.cli.main",
    *(f"cast_ray.cli.{command}" for command in COMMANDS),
]
"""Modules that load no torch: a row's driver and a command that only plans would wait for it."""


def room_of(module: str) -> str | None:
    """The room that a dotted module belongs to; None for the package itself and for other packages."""
    first, *rest = module.split(".")
    if first == "sweeps":
        return "sweeps"
    if first != "cast_ray" or not rest:
        return None
    return ".".join(rest[:2]) if rest[0] == "runtime" else rest[0]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions and `if TYPE_CHECKING`, relative ones resolved."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(p for p in (base, node.module or "") if p)
            # `from cast_ray import losses` names the module only in the alias
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def is_allowed(room: str, other: str) -> bool:
    if room == other:
        return True
    if room == "report":
        return other in REPORT_MAY_USE
    return LAYER[other] < LAYER[room]


def files_of(root: Path) -> list[Path]:
    return sorted([*(root / "cast_ray").rglob("*.py"), *(root / "sweeps").rglob("*.py")])


def violations(root: Path) -> list[str]:
    found = []
    for path in files_of(root):
        room = room_of(module_name(path, root))
        if room is None or room == "runtime":
            continue  # cast_ray/__init__.py and the like
        where = path.relative_to(root)
        if room not in LAYER:
            found.append(f"{where}: {room!r} has no place in the layers; give it one in {Path(__file__).name}")
            continue
        for line, name in sorted(set(imports_of(path, root))):
            top, other = name.partition(".")[0], room_of(name)
            if top == "ray" and room.partition(".")[0] not in RAY_AT_HOME:
                found.append(f"{where}:{line}: imports ray outside {' and '.join(sorted(RAY_AT_HOME))}")
            elif f"{name}.".startswith("torch.distributed.") and room not in DISTRIBUTED_AT_HOME:
                found.append(f"{where}:{line}: torch.distributed outside {' and '.join(sorted(DISTRIBUTED_AT_HOME))}")
            elif top == "argparse" and room not in ARGPARSE_AT_HOME:
                found.append(f"{where}:{line}: imports argparse outside {' and '.join(sorted(ARGPARSE_AT_HOME))}")
            elif other in LAYER and not is_allowed(room, other):
                found.append(f"{where}:{line}: {room} imports {other}, which is not below it")
    return found


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other, directly or through others; lazy and TYPE_CHECKING imports count."""
    files = {module_name(path, root): path for path in files_of(root)}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        imported = (other for _, other in imports_of(path, root))
        ends = {other if other in files else other.rpartition(".")[0] for other in imported}
        arrows[name] = {end for end in ends if end in files and end != name}
    reached: dict[str, set[str]] = {}
    for start in arrows:
        todo, seen = [start], set()
        while todo:
            for end in arrows[todo.pop()] - seen:
                seen.add(end)
                todo.append(end)
        reached[start] = seen
    in_circle = [name for name in sorted(arrows) if name in reached[name]]
    groups: list[list[str]] = []
    for name in in_circle:
        if not any(name in group for group in groups):
            groups.append([other for other in in_circle if other in reached[name] and name in reached[other]])
    return groups


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_no_modules_import_each_other() -> None:
    assert circles(ROOT) == []


def test_the_walk_reads_the_project() -> None:
    read = {room_of(module_name(p, ROOT)) for p in (ROOT / "cast_ray").rglob("*.py")}
    assert {"recipe", "contracts", "losses", "models", "engine", "runtime.sweep", "runtime.worker", "report"} <= read


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_load_no_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120).returncode == 0


PLANTED = [
    ("cast_ray/losses/bad.py", "from cast_ray.models import student\n", "losses imports models"),
    ("cast_ray/models/bad.py", "from cast_ray import losses\n", "models imports losses"),
    ("cast_ray/contracts/bad.py", "def f():\n    import cast_ray.data.formats.coco\n", "contracts imports data"),
    ("cast_ray/evaluation/bad.py", "from ..engine import loop\n", "evaluation imports engine"),
    ("cast_ray/engine/bad.py", "from cast_ray.plan.graph import plan\n", "engine imports plan"),
    ("cast_ray/plan/bad.py", "import ray.data\n", "imports ray outside"),
    ("cast_ray/report/bad.py", "from ray import tune\n", "imports ray outside"),
    ("cast_ray/losses/bad.py", "import torch\nx = torch.distributed.get_rank()\n", "torch.distributed outside"),
    ("cast_ray/teachers/bad.py", "from torch import distributed\n", "torch.distributed outside"),
    ("cast_ray/runtime/sweep/bad.py", "from torch import distributed\n", "torch.distributed outside"),
    ("cast_ray/recipe/bad.py", "import cast_ray.contracts.records\n", "recipe imports contracts"),
    ("cast_ray/common/bad.py", "import cast_ray.recipe\n", "common imports recipe"),
    ("cast_ray/runtime/sweep/bad.py", "from sweeps.ablate import main\n", "runtime.sweep imports sweeps"),
    ("cast_ray/data/bad.py", "from cast_ray.report import overlays\n", "data imports report"),
    ("cast_ray/runtime/store/bad.py", "from cast_ray.runtime.data.images import Images\n", "imports runtime.data"),
    (
        "cast_ray/runtime/worker/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cast_ray.runtime.sweep.run import Sweep\n",
        "runtime.worker imports runtime.sweep",
    ),
    (
        "cast_ray/report/bad.py",
        "from cast_ray.runtime.store.artifacts import ArtifactStore\n",
        "report imports runtime",
    ),
    ("cast_ray/report/bad.py", "from cast_ray.publish.sweep import publish_row\n", "report imports publish"),
    ("cast_ray/publish/bad.py", "from cast_ray.cli.options import Parser\n", "publish imports cli"),
    ("cast_ray/inference/bad.py", "def f():\n    from cast_ray.cli import predict\n", "inference imports cli"),
    ("cast_ray/cli/bad.py", "from cast_ray.predict import main\n", "cli imports predict"),
    ("cast_ray/cli/bad.py", "from sweeps.ablate import main\n", "cli imports sweeps"),
    ("cast_ray/cli/bad.py", "import ray\n", "imports ray outside"),
    ("cast_ray/inference/bad.py", "import argparse\n", "imports argparse outside"),
    ("sweeps/bad.py", "from argparse import ArgumentParser\n", "imports argparse outside"),
    ("cast_ray/utils.py", "", "has no place in the layers"),
    ("cast_ray/runtime/utils.py", "", "has no place in the layers"),
]
ALLOWED = [
    ("cast_ray/losses/good.py", "from cast_ray.losses import matching\nfrom cast_ray.recipe import LossConfig\n"),
    ("cast_ray/engine/good.py", "import torch.distributed as dist\nfrom cast_ray.models.segmenter import build\n"),
    ("cast_ray/runtime/sweep/good.py", "import ray\nfrom cast_ray.plan import graph\nimport raylike\n"),
    ("cast_ray/report/good.py", "from cast_ray.plan.ablation import Table\n"),
    ("cast_ray/cli/good.py", "import argparse\nfrom cast_ray.inference.predictor import Predictor\n"),
    ("sweeps/good.py", "from cast_ray.cli.main import main\n"),
]
CIRCLES = [
    ("from cast_ray.plan import b\n", "from cast_ray.plan.a import x\n"),
    ("from cast_ray.plan.b import x\n", "def f():\n    from cast_ray.plan import a\n"),
    ("import cast_ray.plan.b\n", "if TYPE_CHECKING:\n    from cast_ray.plan.c import x\n"),
]


def _plant(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(("path", "text", "message"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, message: str) -> None:
    _plant(tmp_path, path, text)
    found = violations(tmp_path)
    assert len(found) == 1 and message in found[0] and path in found[0]


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_what_the_house_allows_passes(tmp_path: Path, path: str, text: str) -> None:
    _plant(tmp_path, path, text)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("first", "second"), CIRCLES)
def test_a_planted_circle_is_found(tmp_path: Path, first: str, second: str) -> None:
    _plant(tmp_path, "cast_ray/plan/a.py", first)
    _plant(tmp_path, "cast_ray/plan/b.py", second)
    _plant(tmp_path, "cast_ray/plan/c.py", "from cast_ray.plan import a\n")
    found = circles(tmp_path)
    assert len(found) == 1 and {"cast_ray.plan.a", "cast_ray.plan.b"} <= set(found[0])


def test_a_chain_is_no_circle(tmp_path: Path) -> None:
    _plant(tmp_path, "cast_ray/plan/a.py", "from cast_ray.plan import b\n")
    _plant(tmp_path, "cast_ray/plan/b.py", "import cast_ray.recipe\n")
    assert circles(tmp_path) == []
