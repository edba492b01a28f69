"""Which folder a run's results go to: runs of the same settings share one, and other runs get a separate one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_ray.common.digest import FULL_DIGITS, digest_of
from cast_ray.common.paths import absolute
from cast_ray.common.results_folder import ResultsFolder
from cast_ray.common.text import first_of
from cast_ray.plan.ablation import Table
from cast_ray.plan.settings import differing, overridden, settings_of
from cast_ray.report.run_folder import PLAN, RESULT, RunRequest, read_plan, read_results
from cast_ray.report.settings import value_words

DIGITS = 6
"""Digits of the digest at the end of the name of a separate folder."""
MAX_NAMED = 4


@dataclass(frozen=True)
class RunChoice:
    """The folder of a run. differences: what the folder `beside`, which would have been its own, has otherwise."""

    name: str
    beside: str = ""
    differences: tuple[str, ...] = ()

    def words(self, out: Path, at: Callable[[Path], str] = str) -> str:
        """The folder that results go to, and why it is not the one that a user would expect.

        Args:
            at: what a user knows a folder by, see `ResultsFolder.at`.
        """
        if not self.beside:
            return at(out / self.name)
        return f"{at(out / self.name)}, because {at(out / self.beside)} holds other settings: {named(self.differences)}"


def choose_run(out: Path, name: str, table: Table, settings: Mapping[str, Any]) -> RunChoice:
    """The folder `name` inside `out`, or one beside it if that holds results of other settings.

    A folder fits if the table's rows that it knows are the same and so are their common settings. More seeds, rows and
    tables of the same settings therefore join it, and so does a run that only differs in how it runs. The name of a
    folder beside it ends in a digest, and the same settings find it again.

    Args:
        settings: `Table.settings` of the run.
    """
    differences = {}
    for folder in [out / name, *_beside(out, name)]:
        differences[folder.name] = _differences(folder, table, settings)
        if _is_used(folder) and not differences[folder.name]:
            beside = "" if folder.name == name else name
            return RunChoice(folder.name, beside, tuple(differences.get(beside, ())))
    if not _is_used(out / name):
        return RunChoice(name)
    digest = digest_of([_located(settings), table.rows], FULL_DIGITS, default=list)
    lengths = (DIGITS, 2 * DIGITS, FULL_DIGITS)
    free = (f"{name}-{digest[:length]}" for length in lengths if not _is_used(out / f"{name}-{digest[:length]}"))
    return RunChoice(next(free), name, tuple(differences[name]))


def is_beside(folder: str, name: str) -> bool:
    """Whether a folder may hold runs that were put beside those of a folder `name`, or is that folder."""
    return folder == name or re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{{DIGITS},}}", folder) is not None


def without_digest(name: str) -> str:
    """Name of the folder beside which a folder lies."""
    return re.sub(rf"-[0-9a-f]{{{DIGITS}}}$", "", name)


def fetch_known(results: ResultsFolder, name: str) -> None:
    """Brings to this machine what `choose_run` and `runs_beside` look at, of the folder `name` and those beside it."""
    if results.is_remote:
        folders = [folder for folder in results.names() if is_beside(folder, name)]
        results.fetch(folders, lambda file: file in (PLAN, RESULT))


def runs_beside(run_dir: Path) -> list[tuple[Path, list[str]]]:
    """Folders of the same tables with other settings, and in what they differ from this one."""
    run_dir = run_dir if run_dir.name else run_dir.resolve()
    plan = read_plan(run_dir)
    name = without_digest(run_dir.name)
    found = []
    for folder in [run_dir.parent / name, *_beside(run_dir.parent, name)]:
        if folder.name == run_dir.name or not (folder / PLAN).is_file():
            continue
        other = read_plan(folder)
        shared = [table for table in plan.tables if table.name in other.settings and table.name in plan.settings]
        if shared:
            keys = [words for t in shared for words in _plan_differences(other, t, plan.settings[t.name])]
            found.append((folder, list(dict.fromkeys(keys))))
    return found


def named(differences: Sequence[str]) -> str:
    """The first differences in words, and how many more there are."""
    return first_of(differences, MAX_NAMED)


def _beside(out: Path, name: str) -> list[Path]:
    return sorted(folder for folder in out.glob("*") if folder.name != name and is_beside(folder.name, name))


def _is_used(folder: Path) -> bool:
    return (folder / PLAN).is_file() or any(folder.glob(f"*/{RESULT}"))


def _differences(folder: Path, table: Table, settings: Mapping[str, Any]) -> list[str]:
    """Says in words how the results in a folder differ from a run of a table; [] if no difference is known."""
    plan = read_plan(folder)
    if plan.settings:
        return _plan_differences(plan, table, settings)
    # A folder of an older version: its results say what they were made with.
    settings = _located(settings)
    words: dict[str, None] = {}
    for result in read_results(folder, plan.expected) if _is_used(folder) else ():
        if result.is_unreadable or result.table != table.name or result.row not in table.rows:
            continue
        theirs = _located(settings_of(result.recipe))
        keys = differing(settings, theirs, besides=overridden(table.rows[result.row]))
        words |= dict.fromkeys(_words(key, settings, theirs) for key in keys)
    return list(words)


def _plan_differences(plan: RunRequest, table: Table, settings: Mapping[str, Any]) -> list[str]:
    settings = _located(settings)
    words = []
    known = {other.name: other for other in plan.tables}
    for name, theirs in plan.settings.items():
        theirs = _located(theirs)
        # What another table sets for all of its rows is no setting of the user's.
        own = set() if name == table.name or name not in known else table.base_keys | known[name].base_keys
        words += [_words(key, settings, theirs) for key in differing(settings, theirs, besides=own)]
    if table.name in known:
        rows = json.loads(json.dumps(table.rows, default=list))
        before = json.loads(json.dumps(known[table.name].rows, default=list))
        words += [f"row {row!r} is defined otherwise" for row in rows if row in before and rows[row] != before[row]]
    return list(dict.fromkeys(words))


def _located(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with the absolute path of the dataset's folder."""
    root = settings.get("data.root")
    return dict(settings) | ({"data.root": absolute(root)} if root else {})


def _words(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return f"{key} is {value_words(ours[key])} here and {value_words(theirs[key])} there"
