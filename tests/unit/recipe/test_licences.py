"""The table of licences: every checkpoint and dataset that the code names has a row, and each row says its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import get_args

import pytest

from cast_ray.common.registry import ROWS
from cast_ray.plan.ablation import load_table, table_names
from cast_ray.recipe import SCALES, Recipe, build_recipe, preset_names
from cast_ray.recipe.licences import (
    CHECKPOINTS,
    COMMERCIAL_WORDS,
    DATASETS,
    KNOWN,
    OF_FORMAT,
    UNKNOWN,
    Commercial,
    find_licence,
)
from cast_ray.recipe.models import PUBLISHED_ENCODERS, PUBLISHED_SEGMENTERS
from cast_ray.recipe.teachers import PUBLISHED, TeacherConfig

ROOT = Path(__file__).parents[3]
OWNERS = {name.partition("/")[0] for name in CHECKPOINTS}
NAMED = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(OWNERS)))})/[A-Za-z0-9][\w.-]*\w")


def recipes() -> Iterator[Recipe]:
    """Every preset at every scale, and every row of every table at the table's own preset."""
    for preset in preset_names():
        for scale in SCALES:
            yield build_recipe(preset, scale)
    for name in table_names():
        table = load_table(name)
        yield from (table.row_recipe(row) for row in table.rows)


def named_by_the_recipe(recipe: Recipe) -> set[str]:
    models = (recipe.student, recipe.teacher)
    starts = {source for model in models for source in (model.source, model.encoder.source)} - {""}
    return set(recipe.teacher.checkpoint_fields().values()) | starts


def test_every_checkpoint_of_a_preset_a_table_or_a_kind_has_a_row() -> None:
    names = set().union(
        *map(named_by_the_recipe, recipes()), PUBLISHED_ENCODERS.values(), PUBLISHED_SEGMENTERS.values()
    )
    for kind in PUBLISHED:
        names |= set(TeacherConfig(kind=kind).checkpoint_fields().values())
    assert len(names) >= 15
    assert names <= set(CHECKPOINTS), f"without a row in recipe/licences.py: {sorted(names - set(CHECKPOINTS))}"


def test_every_hub_name_in_code_tables_and_documentation_has_a_row() -> None:
    files = [f for folder in ("cast_ray", "sweeps", "docs", "examples") for f in (ROOT / folder).rglob("*.*")]
    found = {}
    for file in (f for f in files if f.suffix in (".py", ".yaml", ".md") and f.name != "licences.py"):
        for name in NAMED.findall(file.read_text()):
            found[name] = file.relative_to(ROOT)
    # An f-string that a name is put together in is cut at its brace.
    without = {name: place for name, place in found.items() if not any(row.startswith(name) for row in CHECKPOINTS)}
    assert len(found) >= 10 and not without


def test_every_format_and_preset_has_a_row() -> None:
    of_any_data = {"coco", "yolo", "labelme", "label_maps", "mask_files"}  # layouts of tools, which may hold anything
    assert set(ROWS["datasets"]) - of_any_data == set(OF_FORMAT) <= set(DATASETS)
    presets = {name for name in preset_names() if build_recipe(name).data.format not in OF_FORMAT}
    assert {"coco", "nuclei"} <= presets <= set(DATASETS)


@pytest.mark.parametrize("work", [*CHECKPOINTS.values(), *DATASETS.values()], ids=lambda work: work.title)
def test_each_row_says_what_it_knows_and_from_where(work) -> None:
    assert work.source.startswith("https://") and work.licence.label
    assert work.licence.url.startswith("https://") or work.licence is UNKNOWN
    assert date.fromisoformat(work.checked) >= date(2026, 1, 1)
    assert not work.note or work.note.endswith(".")


def test_what_is_known_of_the_licences_that_matter() -> None:
    def commercial(name: str) -> str:
        return (CHECKPOINTS.get(name) or DATASETS[name]).licence.commercial

    assert commercial("facebook/mask2former-swin-large-coco-instance") == "no"
    assert CHECKPOINTS["facebook/mask2former-swin-large-coco-instance"].licence.id == "CC-BY-NC-4.0"
    assert commercial("facebook/sam3") == commercial("facebook/dinov3-vits16-pretrain-lvd1689m") == "conditions"
    assert commercial("cityscapes") == commercial("ade20k") == "no"
    assert commercial("facebook/sam2.1-hiera-large") == commercial("facebook/dinov2-small") == "yes"
    assert set(COMMERCIAL_WORDS) == set(get_args(Commercial))
    assert all(("-nc-" in key) == (licence.commercial == "no") for key, licence in KNOWN.items())


@pytest.mark.parametrize(
    ("text", "label", "commercial"),
    [
        ("Apache-2.0", "Apache-2.0", "yes"),
        (" cc-by-nc-4.0 ", "CC-BY-NC-4.0", "no"),
        ("GPL-3.0-or-later", "GPL-3.0", "conditions"),
        ("coco", "COCO terms of use", "conditions"),
        ("nuclei", "CC0-1.0", "yes"),
        ("ours, all rights reserved", "ours, all rights reserved", "unknown"),
        ("", "unknown", "unknown"),
        ("unknown", "unknown", "unknown"),
    ],
)
def test_a_licence_is_found_by_what_people_write(text: str, label: str, commercial: str) -> None:
    licence = find_licence(text)
    assert (licence.label, licence.commercial) == (label, commercial)


def test_the_documentation_has_the_same_rows() -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    words = {"yes": "yes", "no": "**no**", "conditions": "with conditions", "unknown": "unknown"}
    names = {f"`{name}`": work for name, work in CHECKPOINTS.items()}
    names |= {f"`{name}`: {work.title}": work for name, work in DATASETS.items()}
    rows = [
        f"| {name} | [{work.licence.label}]({work.licence.url}) | {words[work.licence.commercial]} | "
        f"[source]({work.source}), {work.checked} |"
        for name, work in names.items()
    ]
    assert [row for row in rows if row not in page.splitlines()] == []
    assert sum("| [source](" in line for line in page.splitlines()) == len(rows)
