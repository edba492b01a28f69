"""What a sweep will do, before it does it: rows, unique stages as a tree, steps, device-hours, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE
from cast_ray.data.reading.data_report import print_warnings
from cast_ray.plan.cost import PlanCost
from cast_ray.plan.graph import Stage, SweepPlan
from cast_ray.plan.prices import Prices
from cast_ray.recipe.licence_chain import MAX_CHAINS
from cast_ray.runtime.data.dataset import StoredDataset

MAX_NAMES = 12
MAX_USERS = 3
GIB = 2**30
MAX_LINES = 60
"""Stages shown one by one; more are shown by name and place, with their number."""


@dataclass(frozen=True)
class Preview:
    """What `print_plan` says; the numbers of a dry run.

    titles: one line a table; labels: of each row of the plan, with its table where there are several; memory: name of a
    train stage -> bytes of one worker of each stage of that name (None: not estimated), where asked for; licences: what
    the students inherit, a line for each different chain; warnings: what the user must not overlook, one sentence each;
    folders: where the results of each table go.
    """

    plan: SweepPlan
    titles: Sequence[str]
    labels: Sequence[str]
    datasets: Sequence[StoredDataset]
    storage: str
    costs: Mapping[str, PlanCost] = field(default_factory=dict)
    """Model of the devices -> what the plan costs on them; first that of the devices that were last used."""
    prices: Prices | None = None
    """What a device-hour costs; None: nobody has said so."""
    budget_hours: float | None = None
    memory: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    licences: Sequence[str] = ()
    warnings: Sequence[str] = ()
    folders: Sequence[str] = ()
    tree: bool = True


def print_plan(preview: Preview, console: Console) -> None:
    """Says what will run before it runs."""
    plan = preview.plan
    for title in preview.titles:
        console.print(Text(title, "bold"))
    names, seeds = list(dict.fromkeys(preview.labels)), sorted({row.seed for row in plan.rows})
    console.print(f"  rows     {len(names):,}: {_few(names)}", markup=False)
    console.print(f"  seeds    {len(seeds)}: {_few([str(seed) for seed in seeds])}")
    for dataset in preview.datasets:
        num = dataset.num_images
        others = "".join(f" + {num[split]} {split}" for split in ("source", "extra") if split in num)
        console.print(f"  images   {num['train']} train{others}, {num['val']} val, {len(dataset.categories)} classes")
    total = sum(len(row.stages) for row in plan.rows)
    console.print(f"  stages   {len(plan.unique):,} unique of {total:,}, {len(plan.stored):,} found in the store")
    scratch = plan.steps_from_scratch
    saved = scratch - plan.steps_to_run
    console.print(
        f"  steps    {plan.steps_to_run:,} to run, {saved:,} saved of {scratch:,} from scratch "
        f"({100 * saved / max(scratch, 1):.0f} %)"
    )
    for device, cost in preview.costs.items():
        _print_cost(preview, device, cost, console)
    if preview.memory:
        console.print(f"  memory   {_memory_line(preview.memory)}", soft_wrap=True, highlight=False)
    print_licences(preview.licences, console)
    console.print(f"  storage  {preview.storage}", soft_wrap=True, markup=False)
    for folder in preview.folders:
        console.print(f"  results  {folder}", soft_wrap=True, markup=False, highlight=False)
    if preview.tree:
        console.print(stage_tree(preview), highlight=False)
    print_warnings(preview.warnings, console)


def _print_cost(preview: Preview, device: str, cost: PlanCost, console: Console) -> None:
    """Says what the plan would cost on one type of devices, of which hours on others tell nothing."""
    known = {source: count for source, count in cost.sources.items() if source != "unknown"}
    unknown = cost.sources.get("unknown", 0)
    if not known and unknown:
        return
    origin = ", ".join(f"{count:,} {source}" for source, count in known.items()) or "nothing to run"
    rest = f"; {unknown:,} stages left out: nothing like them has run here" if unknown else ""
    where = f", on {device}" if len(preview.costs) > 1 else ""
    console.print(
        f"  devices  {hours(cost.to_run_h)} to run, {hours(cost.from_scratch_h)} from scratch{where} "
        f"(stages: {origin}{rest})"
    )
    for of, price in _prices_of(device, preview.prices):
        spend, alone = (h * price for h in (cost.to_run_h, cost.from_scratch_h))
        of = f" of {of}" if of else ""
        console.print(f"  cost     {spend:,.2f} to run, {alone:,.2f} from scratch, at {price:g} a device-hour{of}")
    if preview.budget_hours is not None:
        enough = (
            "enough"
            if cost.to_run_h <= preview.budget_hours
            else "not enough: the command says at the end what is left"
        )
        console.print(f"  budget   {preview.budget_hours:g} device-hours: {enough}")


def _prices_of(device: str, prices: Prices | None) -> list[tuple[str, float]]:
    """(model or nothing, price) of each cost to tell: all that are named, where it is not known what will compute."""
    if prices is None:
        return []
    if device == UNKNOWN_DEVICE:
        return list(prices.by_type.items())
    return [("", price)] if (price := prices.of(device)) is not None else []


def _memory_line(memory: Mapping[str, Sequence[int | None]]) -> str:
    """`about 9.0 GiB to 12.4 GiB a worker (distill), 11.2 GiB (refine); adapt not estimated: ...`."""
    parts: list[str] = []
    for name, sizes in memory.items():
        known = sorted(size for size in sizes if size is not None)
        if known:
            ends = dict.fromkeys((_bytes(known[0]), _bytes(known[-1])))
            parts.append(f"{' to '.join(ends)}{'' if parts else ' a worker'} ({name})")
    unknown = [name for name, sizes in memory.items() if None in sizes]
    line = [f"about {', '.join(parts)}"] if parts else []
    if unknown:
        line.append(f"{', '.join(unknown)} not estimated: a teacher from checkpoints")
    return "; ".join(line)


def _bytes(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"


def hours(value: float) -> str:
    """Device-hours, or device-minutes where those are few."""
    return f"{value:,.1f} device-hours" if value >= 1 else f"{60 * value:.1f} device-minutes"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


@dataclass
class _Node:
    """Stages that stand at one place of the tree: one, or all of one name below one parent."""

    name: str
    stages: list[Stage] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)


def stage_tree(preview: Preview) -> Tree:
    """Unique stages, each below the one it waits for last; evaluations are counted at its end."""
    plan = preview.plan
    work = [stage for stage in plan.unique.values() if stage.kind != "evaluate"]
    one_by_one = len(work) <= MAX_LINES
    root = _Node("")
    places: dict[str, _Node] = {}
    groups: dict[tuple[int, str], _Node] = {}
    for stage in work:  # parents come first
        waited = (*stage.held_out[-1:], *(stage.parents.get(role) for role in ("labels", "teacher", "init")))
        last = next(filter(None, waited), "")
        parent = places.get(last, root)
        node = None if one_by_one else groups.get((id(parent), stage.name))
        if node is None:
            node = groups[id(parent), stage.name] = _Node(stage.name)
            parent.children.append(node)
        node.stages.append(stage)
        places[stage.fingerprint] = node
    tree = Tree("  stages, each below what it waits for", guide_style="dim")
    _grow(tree, root, preview, 0)
    evaluations = [stage for stage in plan.unique.values() if stage.kind == "evaluate"]
    if evaluations:
        stored = sum(stage.fingerprint in plan.stored for stage in evaluations)
        tree.add(Text(f"evaluate ×{len(evaluations):,}{f', {stored:,} stored' if stored else ''}", "dim"))
    return tree


def _grow(tree: Tree, node: _Node, preview: Preview, depth: int) -> None:
    for child in node.children:
        branch = tree.add(_line(child, preview, depth))
        _grow(branch, child, preview, depth + 1)


def _line(node: _Node, preview: Preview, depth: int) -> Text:
    plan, stages = preview.plan, node.stages
    name = node.name if len(stages) == 1 else f"{node.name} ×{len(stages):,}"
    left = [stage for stage in stages if stage.fingerprint not in plan.stored]
    steps = sum(stage.steps for stage in left)
    mark = "stored" if not left else f"{steps:,} steps" if steps else "to run"
    if 0 < len(left) < len(stages):
        mark += f", {len(stages) - len(left):,} stored"
    if left and (cost := next(iter(preview.costs.values()), None)) is not None:
        seconds = sum(cost.by_stage[stage.fingerprint].device_s for stage in left)
        mark += f", {_duration(seconds)}" if seconds else ""
    users = {i for stage in stages for i in plan.users[stage.fingerprint]}
    names = list(dict.fromkeys(preview.labels[i] for i in sorted(users)))
    number = len(set(preview.labels))
    used_by = ", ".join(names) if len(names) <= MAX_USERS else f"{len(names):,} of {number:,} rows"
    used_by = "all rows" if len(names) == number > 1 else used_by
    # One column for all depths: a level is indented by four.
    line = Text(f"{name:{max(40 - 4 * depth, len(name))}} ", no_wrap=True, overflow="ellipsis")
    return line.append(f"{mark:<24} ", "" if left else "green").append(used_by, "dim")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return f"{shown}, ... {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else shown


def row_labels(rows: Sequence[tuple[str, str]]) -> list[str]:
    """(table, row) of each row -> what it is called in a plan of these tables."""
    several = len({table for table, _ in rows}) > 1
    return [f"{table}:{row}" if several else row for table, row in rows]


def titles_of(tables: Mapping[str, tuple[str, str, str]]) -> list[str]:
    """Table name -> (title, preset, scale), as one line each."""
    return [f"{title}  ({name}, {preset} at {scale})" for name, (title, preset, scale) in tables.items()]


def print_licences(licences: Sequence[str], console: Console) -> None:
    """Says under which licences the students may be used, a line for each of the first chains."""
    more = len(licences) - MAX_CHAINS
    for line in licences[:MAX_CHAINS]:
        console.print(f"  licences {line}", soft_wrap=True, markup=False, highlight=False)
    if more > 0:
        console.print(f"  licences {more:,} more rows have others: `cast-ray store licences` lists all students")
