"""The house's import rules: arrows point one way, leaves stand alone, ray and torch.distributed stay at home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Low to high; a module may import modules of lower layers and of its own folder. `cast_ray/<name>.py` or `/<name>/`.
CONTRACTS = ("console", "files", "recipe", "records", "registry", "soft_targets")
LEAVES = ("datasets", "views", "copy_paste", "batches", "models", "losses", "evaluation")
UPPER = ("teachers", "engine", "stages", "runtime", "report", "sweeps")
LAYER = {name: 0 for name in CONTRACTS} | {name: 1 for name in LEAVES} | {name: i + 2 for i, name in enumerate(UPPER)}
LAYER["sweeps"] = LAYER["report"] + 1  # sweeps print reports; a report never starts a sweep
# `python -m cast_ray.datasets` is a command that shows what the package has: it uses all of it, and nothing uses it;
# so are predict and export, and label, which uses predict.
LAYER["commands"] = LAYER["sweeps"]
LAYER["unfinished"] = LAYER["sweeps"] - 1  # what predict and label share
LAYER |= {"predict": LAYER["sweeps"], "export": LAYER["sweeps"], "label": LAYER["sweeps"] + 1}
# What a contract may use of the others: the recipe knows nothing, the rest may read it.
WITHIN_CONTRACTS: dict[str, set[str]] = {name: set() for name in ("console", "files", "recipe")}
WITHIN_CONTRACTS |= {"records": {"recipe"}, "registry": {"recipe", "records"}, "soft_targets": {"records"}}
RAY_AT_HOME = {"runtime", "sweeps"}
DISTRIBUTED_AT_HOME = {"engine", "runtime"}


def part_of(module: str) -> str | None:
    """The folder or file that a dotted module belongs to; None for the package itself and for other packages."""
    first, _, rest = module.partition(".")
    if "__main__" in rest.split("."):
        return "commands"
    if first == "sweeps":
        return "sweeps"
    return rest.partition(".")[0] or None if first == "cast_ray" else None


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


def is_allowed(part: str, other: str) -> bool:
    if part == other:
        return True
    if part in CONTRACTS and other in CONTRACTS:
        return other in WITHIN_CONTRACTS[part]
    return LAYER[other] < LAYER[part]


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*(root / "cast_ray").rglob("*.py"), *(root / "sweeps").rglob("*.py")]):
        part = part_of(module_name(path, root))
        if part is None:
            continue  # cast_ray/__init__.py
        where = path.relative_to(root)
        if part not in LAYER:
            found.append(f"{where}: {part!r} has no place in the layers; give it one in {Path(__file__).name}")
            continue
        for line, name in sorted(set(imports_of(path, root))):
            top, other = name.partition(".")[0], part_of(name)
            if top == "ray" and part not in RAY_AT_HOME:
                found.append(f"{where}:{line}: imports ray outside {' and '.join(sorted(RAY_AT_HOME))}")
            elif f"{name}.".startswith("torch.distributed.") and part not in DISTRIBUTED_AT_HOME:
                found.append(f"{where}:{line}: torch.distributed outside {' and '.join(sorted(DISTRIBUTED_AT_HOME))}")
            elif other in LAYER and not is_allowed(part, other):
                found.append(f"{where}:{line}: {part} imports {other}, which is not below it")
    return found


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_the_walk_reads_the_project() -> None:
    read = {part_of(module_name(p, ROOT)) for p in (ROOT / "cast_ray").rglob("*.py")}
    assert {"recipe", "records", "losses", "models", "engine", "runtime", "report"} <= read


PLANTED = [
    ("cast_ray/losses/bad.py", "from cast_ray.models import student\n", "losses imports models"),
    ("cast_ray/models/bad.py", "from cast_ray import losses\n", "models imports losses"),
    ("cast_ray/data/views.py", "def f():\n    import cast_ray.data.formats.coco\n", "views imports datasets"),
    ("cast_ray/evaluation/bad.py", "from ..engine import loop\n", "evaluation imports engine"),
    ("cast_ray/engine/bad.py", "from cast_ray.plan.graph import plan\n", "engine imports stages"),
    ("cast_ray/stages/bad.py", "import ray.data\n", "imports ray outside"),
    ("cast_ray/report/bad.py", "from ray import tune\n", "imports ray outside"),
    ("cast_ray/losses/bad.py", "import torch\nx = torch.distributed.get_rank()\n", "torch.distributed outside"),
    ("cast_ray/teachers/bad.py", "from torch import distributed\n", "torch.distributed outside"),
    ("cast_ray/recipe/bad.py", "import cast_ray.contracts.records\n", "recipe imports records"),
    ("cast_ray/runtime/bad.py", "from sweeps.ablate import main\n", "runtime imports sweeps"),
    ("cast_ray/datasets/bad.py", "from cast_ray.report import overlays\n", "datasets imports report"),
    ("cast_ray/runtime/bad.py", "from cast_ray.datasets.__main__ import main\n", "runtime imports commands"),
    ("cast_ray/datasets/__main__.py", "import ray\n", "imports ray outside"),
    ("cast_ray/utils.py", "", "has no place in the layers"),
]
ALLOWED = [
    ("cast_ray/losses/good.py", "from cast_ray.losses import matching\nfrom cast_ray.recipe import LossConfig\n"),
    ("cast_ray/engine/good.py", "import torch.distributed as dist\nfrom cast_ray.models.segmenter import build\n"),
    ("cast_ray/runtime/good.py", "import ray\nfrom cast_ray.stages import graph\nimport raylike\n"),
    ("cast_ray/datasets/__main__.py", "from cast_ray.report.overlays import contact_sheet\n"),
    ("sweeps/good.py", "import ray\nfrom cast_ray.report.tables import write_report\n"),
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
