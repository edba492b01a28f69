"""`cast-ray ablate --until decided`: seeds are added one at a time, for the rows that are still undecided.

Each round is a sweep of the next seed of the open rows and of the baseline, on one Ray for all rounds. What is decided
follows from the run folder alone, so that a command that was stopped resumes where it ended, and a report of the folder
says the same.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from cast_ray.cli.options import EXIT_STOPPED, positive, positive_amount
from cast_ray.common.text import first_of
from cast_ray.plan.ablation import Table
from cast_ray.recipe import Recipe
from cast_ray.report.content import Result
from cast_ray.report.run_folder import PLAN, read_run
from cast_ray.runtime.cluster import RaySession
from cast_ray.runtime.sweep.preview import hours
from cast_ray.runtime.sweep.run import SweepOutcome, SweepRequest, TableRequest

DEFAULT_MAX_SEEDS = 20
MAX_NAMED = 8

RecipeOf = Callable[[Table, str, int], Recipe]
"""(table, row, seed) -> recipe."""
RunRound = Callable[[SweepRequest, Mapping[str, float | None]], tuple[int, SweepOutcome | None]]
"""Runs a sweep and publishes it; table -> smallest effect of interest. Returns the exit code and what became of it."""


def add_until_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a sweep that adds seeds until its rows are decided."""
    until = parser.add_argument_group("how many seeds")
    until.add_argument(
        "--until",
        choices=["decided"],
        help="add seeds one at a time, only for rows whose difference to the baseline is still undecided; needs "
        "--budget-hours, or --dry-run, which says what the first seeds cost",
    )
    until.add_argument(
        "--max-seeds",
        type=positive,
        metavar="N",
        help=f"with --until decided: seeds after which a row is left undecided (default: {DEFAULT_MAX_SEEDS})",
    )
    until.add_argument(
        "--effect",
        type=positive_amount,
        metavar="E",
        help="with --until decided: smallest difference of interest, in the table's metric; a row that differs by less "
        "is decided, too (default: 1.0 for an AP, which is in percent; none for other metrics)",
    )


def check_until_options(arguments: argparse.Namespace) -> None:
    """Refuses combinations of options that mean nothing.

    Raises:
        ValueError: one line that says what was expected.
    """
    if arguments.until is None:
        for flag, value in (("--max-seeds", arguments.max_seeds), ("--effect", arguments.effect)):
            if value is not None:
                raise ValueError(f"{flag} {value:g}: expected --until decided with it")
    elif arguments.budget_hours is None and not arguments.dry_run:
        raise ValueError("--until decided: expected --budget-hours H with it, after which no further stage is started")


@dataclass
class UndecidedTable:
    """One table and the rows of it that may get more seeds.

    Args:
        rows: that the command was asked for, the baseline among them.
        first_seeds: to begin with; later ones follow on the greatest of them.
        folder: the run folder.
    """

    table: Table
    rows: Sequence[str]
    first_seeds: Sequence[int]
    folder: Path
    effect: float | None
    max_seeds: int
    given_up: set[str] = field(default_factory=set)
    """Rows that failed in this command, or that cannot be."""

    def __post_init__(self) -> None:
        from cast_ray.report.confidence_sequence import least_seeds  # SciPy, which a help text does without

        name = self.table.name
        if len(self.rows) < 2:
            raise ValueError(f"table {name!r}: --until decided: expected a row beside the baseline {self.rows[0]!r}")
        # All rows of the table count for the error rate, also those that are not run now.
        self.least = least_seeds(len(self.table.rows) - 1)
        if self.max_seeds < self.least:
            raise ValueError(
                f"--max-seeds {self.max_seeds}: expected {self.least} or more: with fewer seeds no row of the table "
                f"{name!r} can be decided"
            )

    def next_pairs(self) -> list[tuple[str, int]]:
        """(row, seed) that are to run next: at first as many seeds as a decision takes, then one at a time.

        The baseline is always among them, also where its result is stored. Empty when nothing is left to run.
        """
        if self.table.baseline in self.given_up:
            return []
        results = self._results()
        done = _seeds_of(results)
        of_baseline = done.get(self.table.baseline, set())
        pairs: dict[tuple[str, int], None] = {}
        for row in self._open_among(results):
            paired = done.get(row, set()) & of_baseline
            wanted = min(max(self.least, len(self.first_seeds), len(paired) + 1), self.max_seeds)
            for seed in itertools.islice(self._seeds(of_baseline), wanted):
                if seed not in paired:
                    pairs |= dict.fromkeys([(self.table.baseline, seed), (row, seed)])
        return sorted(pairs, key=lambda pair: (pair[1], list(self.table.rows).index(pair[0])))

    def open_rows(self) -> list[str]:
        """The rows that are undecided and neither failed nor left out."""
        return self._open_among(self._results())

    def give_up_missing(self, pairs: Sequence[tuple[str, int]]) -> None:
        """Gives up rows of which a seed that was to run has no result."""
        done = _seeds_of(self._results())
        self.given_up |= {row for row, seed in pairs if seed not in done.get(row, set())}

    def _seeds(self, stored: set[int]) -> Iterator[int]:
        """Seeds in the order in which they are added: rising, as in the report, so that it does not depend on results.

        Args:
            stored: seeds of the baseline that the run folder has already.
        """
        known = sorted({*self.first_seeds, *stored})
        yield from known
        yield from itertools.count(known[-1] + 1)

    def _results(self) -> list[Result]:
        """What the run folder holds of this table; its files are read anew."""
        if not (self.folder / PLAN).is_file():
            return []
        return [result for result in read_run(self.folder).results if result.table == self.table.name]

    def _open_among(self, results: Sequence[Result]) -> list[str]:
        """The rows that some results leave open, see `open_rows`."""
        from cast_ray.report.results import summarise
        from cast_ray.report.statistics import Resampling

        closed = {self.table.baseline, *self.given_up}
        if results:
            report = summarise(results, self.table, resampling=Resampling(None, 0), effect=self.effect)
            closed |= {decision.row for decision in report.decisions if not decision.is_open}
        return [row for row in self.rows if row not in closed]


def _seeds_of(results: Iterable[Result]) -> dict[str, set[int]]:
    """Row -> its seeds that are done."""
    done: dict[str, set[int]] = {}
    for result in results:
        if result.is_done:
            done.setdefault(result.row, set()).add(result.seed)
    return done


def run_until_decided(
    request: SweepRequest,
    tables: Sequence[UndecidedTable],
    recipe_of: RecipeOf,
    run_round: RunRound,
    console: Console,
    at: Callable[[Path], str] = str,
) -> int:
    """Runs seeds until all rows are decided, or the budget or the greatest number of seeds is reached.

    Args:
        request: of all tables; its recipes are replaced by those of each round.
        at: what a user knows a file by, see `ResultsFolder.at`.

    Returns:
        The exit code: 0 when every row is decided, 1 when a row failed, 3 when a limit left one undecided.
    """
    effects = {table.table.name: table.effect for table in tables}
    spent_h, codes, num_rounds, is_stopped = 0.0, [0], 0, False
    with RaySession(request.address, request.num_cpus) as session:
        while pairs := {table.table.name: found for table in tables if (found := table.next_pairs())}:
            budget_h = None if request.budget_hours is None else request.budget_hours - spent_h
            if budget_h is not None and budget_h <= 0:
                is_stopped = True
                break
            _say_round(tables, pairs, spent_h, request, console)
            chosen = [table for table in request.tables if table.table.name in pairs]
            of_round = replace(
                request,
                tables=tuple(_of_round(table, pairs[table.table.name], recipe_of) for table in chosen),
                budget_hours=budget_h,
                session=session,
                with_tree=not num_rounds,
            )
            code, outcome = run_round(of_round, effects)
            if outcome is None:  # a dry run
                return 0
            codes.append(code if code != EXIT_STOPPED else 0)
            spent_h += outcome.device_s / 3600
            num_rounds += 1
            if outcome.stopped:
                is_stopped = True
                break
            for table in tables:
                table.give_up_missing(pairs.get(table.table.name, []))
    left = {table.table.name: table.open_rows() for table in tables}
    if not num_rounds:
        _show_stored(tables, console, at)
    _say_end(left, is_stopped, spent_h, console)
    return max(codes) or (EXIT_STOPPED if is_stopped or any(left.values()) else 0)


def _of_round(table: TableRequest, pairs: Sequence[tuple[str, int]], recipe_of: RecipeOf) -> TableRequest:
    return replace(table, recipes={(row, seed): recipe_of(table.table, row, seed) for row, seed in pairs})


def _say_round(
    tables: Sequence[UndecidedTable],
    pairs: Mapping[str, Sequence[tuple[str, int]]],
    spent_h: float,
    request: SweepRequest,
    console: Console,
) -> None:
    for table in tables:
        if not (of_table := pairs.get(table.table.name)):
            continue
        seeds = sorted({seed for _, seed in of_table})
        rows = [row for row in dict.fromkeys(row for row, _ in of_table) if row != table.table.baseline]
        words = f"next     {table.table.name}: seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} of "
        words += f"{first_of(rows, MAX_NAMED)} and the baseline {table.table.baseline}"
        if request.dry_run:
            words += f"; then one seed at a time for the rows that are still undecided, at most {table.max_seeds} seeds"
        console.print(words, soft_wrap=True, highlight=False)
    if spent_h and request.budget_hours is not None:
        console.print(f"  used   {hours(spent_h)} of {hours(request.budget_hours)}", highlight=False)


def _show_stored(tables: Sequence[UndecidedTable], console: Console, at: Callable[[Path], str]) -> None:
    """Shows the reports of tables of which nothing was left to run."""
    from cast_ray.report.write import show, write_report

    for table in tables:
        if (table.folder / PLAN).is_file():
            show(write_report(table.folder, tell=console.print), console, at)


def _say_end(left: Mapping[str, Sequence[str]], is_stopped: bool, spent_h: float, console: Console) -> None:
    rows = [f"{table}: {first_of(names, MAX_NAMED)}" for table, names in left.items() if names]
    if not rows:
        words = "All rows that ran to their end are decided"
    else:
        why = "the budget is spent" if is_stopped else "the greatest number of seeds is reached"
        words = f"Undecided, because {why}: {'; '.join(rows)}"
    console.print(f"{words}; used {hours(spent_h)}.", soft_wrap=True, highlight=False)
