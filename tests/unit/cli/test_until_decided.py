"""Seeds that are added until rows are decided: which ones, when they end, how they resume; sweeps are played."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from report_scenes import failed, result, save
from rich.console import Console

from cast_ray.cli import ablate
from cast_ray.cli.main import main
from cast_ray.cli.until_decided import UndecidedTable, run_until_decided
from cast_ray.plan.ablation import load_table
from cast_ray.recipe import build_recipe
from cast_ray.report.run_folder import write_plan
from cast_ray.report.write import write_report
from cast_ray.runtime.sweep.run import SweepOutcome, SweepRequest, TableRequest

GAINS = {"sup": 0.0, "sup+semi": 6.0, "sup+pxl": 0.0, "sup+semi+pxl": 1.5}
SPREAD = {"sup": 0.0, "sup+semi": 0.3, "sup+pxl": 0.2, "sup+semi+pxl": 3.0}


@dataclass
class PlayedSweeps:
    """Stands for `ablate._run`: each row and seed ends with the AP that its gain and spread give."""

    folder: Path
    device_h: float = 1.0
    failing: tuple[tuple[str, int], ...] = ()
    stop_after: int = 1000
    rounds: list[list[tuple[str, int]]] = field(default_factory=list)
    budgets: list[float | None] = field(default_factory=list)

    def __call__(self, request: SweepRequest, effects: Mapping[str, float | None]) -> tuple[int, SweepOutcome | None]:
        (table,) = request.tables
        if request.dry_run:
            self.rounds.append(list(table.recipes))
            return 0, None
        if len(self.rounds) == self.stop_after:
            raise KeyboardInterrupt
        self.rounds.append(list(table.recipes))
        self.budgets.append(request.budget_hours)
        named = {name: effect for name, effect in effects.items() if effect is not None}
        write_plan(self.folder, [table.table], [("losses", *pair) for pair in table.recipes], effects=named)
        found = []
        for row, seed in table.recipes:
            noise = np.random.default_rng([seed, len(row)]).normal() * SPREAD[row]
            each = result(row, min(seed, 8), ap=20 + (seed % 5) + GAINS[row] + noise)
            each |= {"seed": seed, "recipe": {**each["recipe"], "seed": seed}}
            if (row, seed) in self.failing:
                each = failed(row, min(seed, 8)) | {"seed": seed}
            found.append(each)
        save(self.folder, found)
        code = int(any(pair in self.failing for pair in table.recipes))
        return code, SweepOutcome((), None, 3600 * self.device_h)


def play(
    sweeps: PlayedSweeps,
    rows: tuple[str, ...] = tuple(GAINS),
    budget_hours: float = 100.0,
    first_seeds: tuple[int, ...] = (0,),
    effect: float = 1.0,
    max_seeds: int = 9,
) -> int:
    open_table = UndecidedTable(load_table("losses"), rows, first_seeds, sweeps.folder, effect, max_seeds)
    name = sweeps.folder.name
    request = SweepRequest(
        (TableRequest(open_table.table, {}, name),), "storage", None, None, budget_hours=budget_hours
    )
    recipe = build_recipe("shapes", "smoke")
    return run_until_decided(request, [open_table], lambda table, row, seed: recipe, sweeps, Console(width=200))


def test_only_open_rows_get_further_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps = PlayedSweeps(tmp_path / "run")
    assert play(sweeps) == 3  # a row is left undecided
    first, *later = sweeps.rounds
    assert first == [(row, seed) for seed in (0, 1, 2) for row in GAINS]  # with fewer nothing can be decided
    assert [seed for of_round in later for seed in {seed for _, seed in of_round}] == list(range(3, 9))
    assert all(("sup", seed) in of_round for of_round in later for _, seed in of_round)
    rows = [{row for row, _ in of_round} for of_round in later]
    assert all("sup+semi" not in of_round for of_round in rows) and rows[-1] == {"sup", "sup+semi+pxl"}
    assert rows == sorted(rows, key=len, reverse=True)  # a decided row never comes back
    assert sweeps.budgets == [100.0 - n for n in range(7)]
    output = capsys.readouterr().out
    assert "Undecided, because the greatest number of seeds is reached: losses: sup+semi+pxl" in output
    # The report of the folder says the same.
    (report,) = write_report(sweeps.folder).reports
    answers = {d.row: (d.answer, d.num_seeds) for d in report.decisions}
    assert answers["sup+semi"] == ("better", 3) and answers["sup+semi+pxl"] == ("undecided", 9)
    assert answers["sup+pxl"][0] == "equal" and answers["sup+pxl"][1] < 9


def test_a_stopped_command_resumes_from_its_results(tmp_path: Path) -> None:
    whole, cut = PlayedSweeps(tmp_path / "a"), PlayedSweeps(tmp_path / "b", stop_after=2)
    play(whole)
    with pytest.raises(KeyboardInterrupt):
        play(cut)
    again = PlayedSweeps(tmp_path / "b")
    play(again)
    assert cut.rounds + again.rounds == whole.rounds
    nothing = PlayedSweeps(tmp_path / "b")
    assert play(nothing) == 3 and nothing.rounds == []


def test_the_budget_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps = PlayedSweeps(tmp_path / "run", device_h=2.0)
    assert play(sweeps, budget_hours=5.0) == 3
    assert sweeps.budgets == [5.0, 3.0, 1.0]
    assert "Undecided, because the budget is spent: losses: " in capsys.readouterr().out


def test_a_failed_row_gets_no_further_seed(tmp_path: Path) -> None:
    sweeps = PlayedSweeps(tmp_path / "run", failing=(("sup+semi+pxl", 4),))
    assert play(sweeps) == 1
    asked = [pair for of_round in sweeps.rounds for pair in of_round]
    assert max(seed for row, seed in asked if row == "sup+semi+pxl") == 4
    alone = PlayedSweeps(tmp_path / "other", failing=(("sup", 1),))
    assert play(alone) == 1 and len(alone.rounds) == 1  # without the baseline nothing can be compared


def test_seeds_that_are_stored_count(tmp_path: Path) -> None:
    """Seeds of an earlier command, in any number, join those that are added."""
    sweeps = PlayedSweeps(tmp_path / "run")
    play(sweeps, rows=("sup", "sup+semi+pxl"), first_seeds=(5, 3), max_seeds=4)
    assert sweeps.rounds[0] == [(row, seed) for seed in (3, 5, 6) for row in ("sup", "sup+semi+pxl")]
    assert sweeps.rounds[1] == [("sup", 7), ("sup+semi+pxl", 7)]
    more = PlayedSweeps(tmp_path / "run")
    play(more, rows=("sup", "sup+semi"), max_seeds=5)
    assert [seed for row, seed in more.rounds[0] if row == "sup+semi"] == [0, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-seeds", "5"], "--max-seeds 5: expected --until decided with it"),
        (["--effect", "0.5"], "--effect 0.5: expected --until decided with it"),
        (["--until", "decided"], "--until decided: expected --budget-hours H with it"),
        (["--until", "decided", "--budget-hours", "1", "--max-seeds", "2"], "--max-seeds 2: expected 3 or more"),
        (["--until", "decided", "--budget-hours", "1", "--rows", "sup"], "expected a row beside the baseline 'sup'"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "losses", "--scale", "smoke", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_the_first_seeds_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ["data.shapes.num_source=8", "data.shapes.num_train=12", "data.shapes.num_val=4"]
    settings = [part for setting in tiny for part in ("--set", setting)]
    command = ["losses", "--scale", "smoke", *settings, "--rows", "sup+semi", "--until", "decided", "--dry-run"]
    assert ablate.main([*command, "--storage", str(tmp_path / "storage")]) == 0
    output = capfd.readouterr().out
    assert "next     losses: seeds 0, 1, 2 of sup+semi and the baseline sup; then one seed at a time" in output
    assert "  seeds    3: 0, 1, 2" in output and "  rows     2: sup, sup+semi" in output and "  devices  " in output


def test_the_effect_stands_in_the_run_folder(tmp_path: Path) -> None:
    sweeps = PlayedSweeps(tmp_path / "run")
    play(sweeps, rows=("sup", "sup+pxl"), effect=0.01, max_seeds=3)
    assert json.loads((sweeps.folder / "sweep.json").read_text())["effects"] == {"losses": 0.01}
    (report,) = write_report(sweeps.folder).reports
    assert report.effect == 0.01
