"""Results of different settings: what counts as one, that they are told apart in a report and in run folders."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from report_scenes import result, save
from rich.console import Console

from cast_ray.cli import ablate
from cast_ray.cli.report import main as report
from cast_ray.common.results_folder import ResultsFolder
from cast_ray.plan.ablation import Table, load_table
from cast_ray.plan.graph import DataHashes, plan
from cast_ray.plan.settings import changes_nothing, settings_of
from cast_ray.recipe import build_recipe, recipe_keys
from cast_ray.report.content import Report
from cast_ray.report.results import summarise
from cast_ray.report.run_choice import choose_run, runs_beside
from cast_ray.report.run_folder import read_results, write_plan
from cast_ray.report.tables import print_report

LR = "stages.refine.lr"


def made(
    row: str, seed: int = 0, ap: float | None = None, table: str = "losses", overrides: Any = None
) -> dict[str, Any]:
    recipe = load_table("losses").row_recipe(row, "shapes", "demo", seed, overrides)
    return result(row, seed, ap, recipe=recipe.model_dump(mode="json"), table=table)


def report_of(folder: Path, results: list[dict[str, Any]], table: Table | None = None) -> Report:
    return summarise(read_results(save(folder, results)), table)


def warnings_of(report: Report) -> list[str]:
    return [note for note in report.notes if note.startswith("WARNING")]


def test_rows_of_different_settings_are_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, [made("sup"), made("sup+semi", overrides={LR: 0.01, "data.label_fraction": 0.5})])
    (warning,) = warnings_of(report)
    assert warning == (
        "WARNING: results of different settings are mixed in this table, so that rows differ by more than the table "
        "says: data.label_fraction (0.04: sup; 0.5: sup+semi), stages.refine.lr (5e-05: sup; 0.01: sup+semi)."
    )
    console = Console(width=100, file=io.StringIO(), record=True)
    print_report(report, console)
    assert "stages.refine.lr (5e-05: sup; 0.01: sup+semi)" in " ".join(console.export_text().split())


def test_what_the_table_itself_varies_is_no_warning(tmp_path: Path) -> None:
    rows = ("sup", "sup+semi", "sup+pxl", "sup+semi+pxl")
    results = [made(row, seed) for row in rows for seed in (0, 1)]
    results[1] = made("sup", 1, overrides={"runtime.num_workers": 2, "stages.distill.checkpoint_every_steps": 7})
    assert warnings_of(report_of(tmp_path / "losses", results)) == []
    table = load_table("contrast")  # whose rows take whole columns of the contrastive term
    mine = [
        result("sup", table="contrast", recipe=table.row_recipe(row, "shapes").model_dump(mode="json")) | {"row": row}
        for row in table.rows
    ]
    assert warnings_of(report_of(tmp_path / "contrast", mine)) == []


def test_a_key_that_some_rows_override_is_compared_among_the_others(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {"sup": {}, "sup+semi": {LR: "x10"}, "sup+pxl": {}}
    table = Table(name="mine", title="t", metric="student/mask_ap", baseline="sup", rows=rows)
    lrs = {"sup": 5e-05, "sup+semi": 0.005, "sup+pxl": 5e-05}

    def results(changes: dict[str, float]) -> list[dict[str, Any]]:
        recipes = {row: build_recipe("shapes", "demo", {LR: lr}) for row, lr in (lrs | changes).items()}
        return [result(row, table="mine", recipe=r.model_dump(mode="json")) for row, r in recipes.items()]

    assert warnings_of(report_of(tmp_path / "a", results({}), table)) == []
    (warning,) = warnings_of(report_of(tmp_path / "b", results({"sup+pxl": 0.001}), table))
    assert "stages.refine.lr (5e-05: sup; 0.001: sup+pxl)" in warning


def test_seeds_of_different_settings_are_not_averaged(tmp_path: Path) -> None:
    old, new = made("sup", 0, ap=0.0), made("sup", 1, ap=40.0, overrides={LR: 0.01})
    report = report_of(tmp_path, [old, new, made("sup", 2, ap=42.0, overrides={LR: 0.01})])
    cell = report.rows[0].cells["student/mask_ap"]
    assert (cell.mean, cell.num_seeds, report.rows[0].seeds_done) == (41.0, 2, (1, 2))
    assert warnings_of(report) == [
        "WARNING: sup, seed 0 is left out, because its settings are not those of the row's newest result (seed 2): "
        "stages.refine.lr 5e-05 instead of 0.01."
    ]
    assert {r.seed for r in report.results} == {1, 2}  # curves over seeds are means too


def test_a_field_that_an_older_version_did_not_have_is_unknown(tmp_path: Path) -> None:
    old, new = made("sup", 0), made("sup", 1)
    del old["recipe"]["stages"]["refine"]["ema"], old["recipe"]["pseudo"]
    report = report_of(tmp_path, [old, new])
    assert report.rows[0].seeds_done == (0, 1) and warnings_of(report) == []


def test_different_teachers_before_adaptation_are_not_averaged(tmp_path: Path) -> None:
    results = [made("sup"), made("sup+semi")]
    for each, fingerprint in zip(results, "ab"):
        each["evaluations"] = {"zero_shot": fingerprint}
    assert report_of(tmp_path / "two", results).zero_shot == {}
    results[1]["evaluations"] = results[0]["evaluations"]
    assert report_of(tmp_path / "one", results).zero_shot["zero_shot/mask_ap"] == 21.5


CHANGED: dict[str, Any] = {
    "data.format": None,  # another dataset altogether
    "data.root": None,
    "data.image_px": [32, 32],
    "data.scale_jitter": [0.5, 2.0],
    "data.label_family": None,
    "scale": None,
    "preset": None,
    "teacher.kind": None,
    "labels.mode": "online",
    "evaluation.metric": "cityscapes",
    "loss.pseudo_weighting": "score",
    "runtime.amp": "bf16",
}


def test_settings_are_what_enters_a_fingerprint() -> None:
    """Every field of a recipe that a run of the embedded experiment can change: a setting, or no part of a result."""
    base = {"loss.lambda_semi": 1.0, "loss.lambda_pxl": 0.5, "data.label_family": "per-class"}
    hashes = DataHashes(extra="e")

    def prints(overrides: dict[str, Any]) -> set[str]:
        row = plan(build_recipe("shapes", "demo", base | overrides), "0" * 64, hashes=hashes)
        return {stage.fingerprint for stage in row.stages}

    flat = settings_of(build_recipe("shapes", "demo", base).model_dump(mode="json"))
    before, checked, wrong = prints({}), 0, list[str]()
    for key in recipe_keys():
        value = CHANGED.get(key, _another(flat.get(key)))
        if value is None or key.startswith("data.shapes.") or key in ("seed", "data.verify"):
            continue
        try:
            changed = not prints({key: value}) <= before
        except ValueError:
            continue
        checked += changed
        if changed and changes_nothing(key):
            wrong.append(key)
    assert wrong == [] and checked > 60
    assert all(changes_nothing(f"stages.{s}.batch_unlabelled") for s in ("pretrain", "adapt", "refine"))
    for key in ("stages.distill.checkpoint_every_steps", "stages.refine.accumulate", "evaluation.every_steps"):
        assert changes_nothing(key) and prints({key: 4}) == before
    assert changes_nothing("pseudo.on_empty") and prints({"pseudo.on_empty": "warn"}) == before
    assert changes_nothing("labels.mode") and prints({"labels.mode": "online"}) <= before


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value + 2
    return value / 2 + 0.01 if isinstance(value, float) else None


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def run(out: Path, table: Table | None = None, *, name: str = "losses-shapes-demo", overrides: Any = None) -> str:
    """Announces a run as the command does; returns the name of the folder that it goes to."""
    table = table or load_table("losses")
    settings = table.settings("shapes", "demo", overrides)
    choice = choose_run(out, name, table, settings)
    write_plan(out / choice.name, [table], [(table.name, "sup", 0)], settings={table.name: settings})
    return choice.name


def test_other_settings_go_to_a_folder_of_their_own_and_find_it_again(out: Path) -> None:
    first = run(out)
    other = run(out, overrides={LR: "0.01"})
    assert first == "losses-shapes-demo" and other.startswith("losses-shapes-demo-") and len(other) == len(first) + 7
    third = run(out, overrides={LR: "0.02"})
    assert len({first, other, third}) == 3
    assert run(out) == first and run(out, overrides={LR: 0.01}) == other and run(out, overrides={LR: "1e-2"}) == other
    table = load_table("losses")
    choice = choose_run(out, first, table, table.settings("shapes", "demo", {LR: "0.03"}))
    assert choice.words(out).startswith(
        f"{out / choice.name}, because {out / first} holds other settings: {LR} is 0.03 here and 5e-05 there"
    )
    assert run(out / "elsewhere", overrides={LR: "0.01"}) == first  # the first of its folder, whatever its settings


def test_what_changes_no_result_joins(out: Path) -> None:
    first = run(out)
    for key, value in {
        "runtime.num_workers": "2",
        "runtime.amp": "off",
        "stages.distill.checkpoint_every_steps": "4",
        "stages.distill.accumulate": "2",
        "evaluation.batch": "8",
        "seed": "3",
    }.items():
        assert run(out, overrides={key: value}) == first, key


def test_the_precision_is_a_setting(out: Path) -> None:
    first = run(out)
    half = run(out, overrides={"runtime.use_gpu": "true"})
    assert half != first and run(out, overrides={"runtime.amp": "bf16"}) == half
    assert run(out, overrides={"runtime.use_gpu": "true", "runtime.amp": "off"}) == first


def test_more_rows_and_tables_of_the_same_settings_join(out: Path) -> None:
    spec: dict[str, Any] = {"title": "t", "metric": "student/mask_ap", "baseline": "sup", "rows": {"sup": {}}}
    mine = Table(name="mine", **spec)
    assert run(out, mine, name="x") == "x"
    longer = Table(name="mine", **spec | {"rows": {"sup": {}, "b": {LR: 0.1}}})
    assert run(out, longer, name="x") == "x"
    assert run(out, Table(name="other", **spec | {"base": {"loss.lambda_pxl": 0.3}}), name="x") == "x"
    assert run(out, load_table("losses"), name="x") == "x"
    assert run(out, load_table("losses"), name="x", overrides={LR: "0.3"}) != "x"
    changed = Table(name="mine", **spec | {"rows": {"sup": {LR: 0.7}, "b": {LR: 0.1}}})
    choice = choose_run(out, "x", changed, changed.settings("shapes", "demo"))
    assert choice.name != "x" and choice.differences == ("row 'sup' is defined otherwise",)


def test_a_folder_of_an_older_version_is_known_by_its_results(out: Path) -> None:
    name = "losses-shapes-demo"
    results = [made("sup"), made("sup+pxl", 1)]
    for each in results:
        del each["recipe"]["pseudo"]
    save(out / name, results)
    write_plan(out / name, [load_table("losses")], [("losses", "sup", 0)])
    plan_file = out / name / "sweep.json"
    plan_file.write_text(json.dumps({k: v for k, v in json.loads(plan_file.read_text()).items() if k != "settings"}))
    table = load_table("losses")
    assert choose_run(out, name, table, table.settings("shapes", "demo")).name == name
    choice = choose_run(out, name, table, table.settings("shapes", "demo", {LR: "0.01"}))
    assert choice.name != name and choice.differences == (f"{LR} is 0.01 here and 5e-05 there",)


def test_the_folder_of_the_data_counts_however_it_is_written(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(out, overrides={"data.root": "data"})
    assert run(out, overrides={"data.root": str(tmp_path / "data")}) == first
    assert run(out, overrides={"data.root": "other"}) != first


def test_report_names_the_folders_beside_one(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = run(out), run(out, overrides={LR: "0.01"})
    (out / f"{first}-abcdef").mkdir()  # not a run
    assert runs_beside(out / first) == [(out / other, [f"{LR} is 5e-05 here and 0.01 there"])]
    assert runs_beside(out / other) == [(out / first, [f"{LR} is 0.01 here and 5e-05 there"])]
    save(out / first, [made("sup")])
    assert report([str(out / first)]) == 0
    assert f"Beside it: {out / other} holds the same table with other settings: {LR}" in capsys.readouterr().out


def test_the_command_asks_for_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = load_table("losses")
    settings = table.settings("shapes", "smoke", {"data.shapes.num_train": 12})
    write_plan("runs/losses-shapes-smoke", [table], [("losses", "sup", 0)], settings={"losses": settings})

    def request(*arguments: str) -> Any:
        common = ["losses", "--scale", "smoke", "--set", "data.shapes.num_train=12"]
        read = ablate._parser().parse_args([*common, *arguments])
        return ablate._request(read, ResultsFolder("runs", Path("runs"))).tables[0]

    assert request("--seeds", "5").name == "losses-shapes-smoke" and not request("--seeds", "5").has_own_folder
    other = request("--set", f"{LR}=0.01")
    assert other.has_own_folder and other.folder.startswith(f"runs/{other.name}, because runs/losses-shapes-smoke ")
    assert other.settings[LR] == 0.01
