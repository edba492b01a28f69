"""The command before Ray: requests, plans of several tables, what a dry run prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
import yaml
from dataset_folders import write_ade20k, write_cityscapes

from cast_ray.cli import ablate, search
from cast_ray.cli.main import main as cast_ray_main
from cast_ray.cli.options import runs_place, storage_path
from cast_ray.common.results_folder import open_results
from cast_ray.plan.ablation import table_names
from cast_ray.plan.graph import plan, plan_sweep
from cast_ray.plan.prices import ANY, Prices
from cast_ray.recipe import build_recipe
from cast_ray.recipe.licences import CHECKPOINTS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep import run as sweep
from cast_ray.runtime.sweep.run import SweepRequest, sweep_name

TINY = ["data.shapes.num_source=8", "data.shapes.num_train=12", "data.shapes.num_val=4"]
SMALL = ["--scale", "smoke", *(part for setting in TINY for part in ("--set", setting))]

DryRun = Callable[..., str]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> DryRun:
    """`dry_run(*arguments)`: what the command prints with --dry-run, without starting Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAST_RAY_STORAGE", raising=False)

    def call(*arguments: str) -> str:
        code = ablate.main([*arguments, "--dry-run", "--storage", str(tmp_path / "storage")])
        found = capfd.readouterr()
        assert code == 0, found.err
        assert not ray.is_initialized()
        return found.out

    return call


def request_of(*arguments: str) -> SweepRequest:
    read = ablate._parser().parse_args(list(arguments))
    with open_results(runs_place(read.out, storage_path(read.storage))) as results:
        return ablate._request(read, results)


def line(output: str, name: str) -> str:
    (found,) = [text for text in output.splitlines() if text.startswith(f"  {name} ")]
    return found


def test_several_tables_are_one_plan(dry_run: DryRun) -> None:
    output = dry_run("losses", "stages", *SMALL)
    assert "What each loss term is worth  (losses, shapes at smoke)" in output
    assert "What each stage is worth  (stages, shapes at smoke)" in output
    assert line(output, "rows").startswith("  rows     9: losses:sup, losses:sup+semi")
    assert line(output, "stages") == "  stages   35 unique of 79, 0 found in the store"
    assert line(output, "steps") == "  steps    92 to run, 140 saved of 232 from scratch (60 %)"
    tree = output.partition("each below what it waits for")[2]
    (adapted, contrasted) = [text for text in tree.splitlines() if " adapt " in text]
    assert "losses:sup, losses:sup+semi" in adapted and "4 of 9 rows" in contrasted
    assert tree.index("pretrain") < tree.index("adapt") < tree.index("label-adapted") < tree.index("selftrain")


def test_a_row_that_reads_no_unlabelled_image_needs_none(dry_run: DryRun) -> None:
    """lambda_pxl stays above 0 here, but without a contrastive loss no stage reads D_u."""
    settings = ("loss.lambda_semi=0", "contrastive.kind=none", "data.label_fraction=1.0")
    row = ("losses", *SMALL, "--rows", "sup+semi+pxl", *(part for text in settings for part in ("--set", text)))
    output = dry_run(*row)
    assert "label-" not in output and "distill" in output
    with pytest.raises(AssertionError, match="leaves 0 unlabelled images"):  # distill has L_pxl
        dry_run(*row, "--set", "contrastive.kind=cast")


@pytest.mark.parametrize("preset", ["cityscapes", "ade20k"])
def test_a_row_without_a_teacher_is_left_out_unless_asked_for(
    dry_run: DryRun, tmp_path: Path, preset: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write = {"cityscapes": write_cityscapes, "ade20k": write_ade20k}[preset]
    data = ("--preset", preset, "--scale", "smoke", "--set", f"data.root={write(tmp_path / 'data', num_train=24)}")
    output = dry_run("stages", "main", *data)
    assert output.count("left out: ") == 3 and "left out: main, row 'zero-shot labels'" in output
    assert line(output, "rows").endswith(
        "6: stages:full, stages:no-refine, stages:no-distill, main:supervised, main:self-training, main:CAST"
    )
    storage = str(tmp_path / "other")
    assert ablate.main(["stages", *data, "--rows", "full", "no-adapt", "--dry-run", "--storage", storage]) == 2
    assert "stages, row 'no-adapt': stages.use_adapt is false" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["ablate", "search"])
def test_a_folder_of_other_files_is_no_storage(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.png").touch()
    arguments = ["losses", "--preset", "shapes", "--scale", "smoke", "--storage", str(photos)]
    assert {"ablate": ablate.main, "search": search.main}[command](arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: storage path '{photos}' holds other files (1.png): expected a folder that is ")
    assert [path.name for path in photos.iterdir()] == ["1.png"]


def test_what_is_stored_is_shown(dry_run: DryRun, tmp_path: Path) -> None:
    request = request_of("losses", *SMALL, "--rows", "sup")
    dry_run("losses", *SMALL)
    from rich.console import Console

    from cast_ray.runtime.sweep.planner import RowPlanner

    store = ArtifactStore(str(tmp_path / "storage"))
    recipe = request.tables[0].recipes["sup", 0]
    planner = RowPlanner({"x": [recipe]}, store, Console(), pytest.fail)
    _, row = planner.plan(recipe, table="losses", run="x", row="sup")
    store.commit(row.roles["pretrain"], {"stage_seconds": 80.0, "num_workers": 1, "device": "cpu"})
    output = dry_run("losses", *SMALL, "--price-per-gpu-hour", "2.5")
    assert line(output, "stages") == "  stages   30 unique of 38, 1 found in the store"
    (pretrain,) = [text for text in output.splitlines() if "pretrain" in text]
    assert "stored" in pretrain and "all rows" in pretrain
    # Of the teacher's other stages one does the same work a step, and three the same an image.
    assert "25 estimated, 1 measured, 3 scaled" in line(output, "devices")
    assert "at 2.5 a device-hour" in line(output, "cost")


def test_the_plan_says_what_a_worker_needs(dry_run: DryRun) -> None:
    wide = ["--set", "stages.distill.batch_labelled=64", "--set", "stages.distill.batch_unlabelled=64"]
    output = dry_run("losses", *SMALL, *wide)
    (words,) = re.findall(r"about (.*)", line(output, "memory"))
    assert words.count("a worker") == 1 and "not estimated" not in words
    ((low, high),) = re.findall(r"(\d+) MiB to (\d+) MiB \(distill\)", words)
    assert float(high) > 1.5 * float(low)  # of the rows without and with D_u
    assert re.search(r"\d MiB a worker \(pretrain\)", words) and "(refine)" in words


def test_the_papers_experiment_is_planned_without_a_hub(dry_run: DryRun, tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path / "data", 16, 4)
    output = dry_run("main", "--preset", "cityscapes", "--set", f"data.root={root}")
    assert "device-hours to run" in line(output, "devices") and "left out" not in line(output, "devices")
    memory = line(output, "memory")
    assert re.search(r"GiB \(distill\)", memory) and re.search(r"MiB a worker \(evaluate\)", memory)
    _, _, unknown = memory.partition("; ")
    assert unknown.endswith("not estimated: a teacher from checkpoints") and "selftrain" in unknown


def test_small_runs_do_not_count_memory() -> None:
    request, recipe = Mock(dry_run=False), build_recipe("shapes", "smoke")
    planned = plan_sweep([plan(recipe, "h")], ())
    planner = Mock(num_classes=Mock(return_value=4))
    assert sweep._memory(request, planned, planner) == {}
    on_gpu = plan_sweep([plan(build_recipe("shapes", "smoke", {"runtime.use_gpu": True}), "h")], ())
    assert set(sweep._memory(request, on_gpu, planner)) == {"pretrain", "adapt", "selftrain", "distill", "refine"}


def test_ten_thousand_rows_are_summarised(dry_run: DryRun, tmp_path: Path) -> None:
    """Without cost, whose FLOPs need torch: the lines do not grow with the rows."""
    values = [i / 10 for i in range(1, 11)]
    grid = {"loss.lambda_pxl": values, "contrastive.temperature": values, "stages.distill.lr": values}
    spec = {
        "title": "Big",
        "metric": "student/mask_ap",
        "baseline": "lambda_pxl=0.1, temperature=0.1, lr=0.1",
        "grid": grid,
    }
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    output = dry_run(str(tmp_path / "big.yaml"), *SMALL, "--seeds", *map(str, range(10)))
    assert "1,000: lambda_pxl=0.1, temperature=0.1, lr=0.1" in output and "... 988 more" in output
    assert "45,002 unique of 110,000" in output
    assert "distill ×10,000" in output and len(output.splitlines()) < 30


def test_the_plan_says_what_the_students_inherit(dry_run: DryRun, tmp_path: Path) -> None:
    output = dry_run("losses", *SMALL)
    assert line(output, "licences") == "  licences data shapes: Apache-2.0" and "WARNING" not in output
    root = write_cityscapes(tmp_path / "data", 16, 4)
    of_data = "data cityscapes: Cityscapes licence agreement"
    data = ("main", "--preset", "cityscapes", "--set", f"data.root={root}", "--set", "teacher.kind=mask2former")
    output = dry_run(*data)
    alone, taught = [text for text in output.splitlines() if text.startswith("  licences ")]
    assert alone == f"  licences supervised: encoder facebook/dinov2-small: Apache-2.0; {of_data}"
    assert "self-training" in taught and "CAST: teacher facebook/mask2former-swin-large-coco-instance: CC-BY-" in taught
    warnings = [text for text in output.splitlines() if text.startswith("WARNING: ")]
    assert any("CC-BY-NC-4.0, no commercial use" in text and "supervised" not in text for text in warnings)
    assert any(text.startswith(f"WARNING: the student inherits the terms of {of_data}, no comm") for text in warnings)
    output = dry_run(*data[:-2], "--set", "data.licence=MIT", "--teacher", "permissive")
    assert "CC-BY-NC" not in output and "WARNING" not in output and "facebook/sam2.1-hiera-large: Apache-2.0" in output


def test_a_search_says_what_its_students_inherit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from cast_ray.runtime.search import run as search_run

    monkeypatch.setattr(search_run, "open_study", Mock(side_effect=ValueError("far enough")))
    given = ["--storage", str(tmp_path / "storage"), "--out", str(tmp_path / "runs")]
    assert search.main(["losses", *SMALL, *given, "--set", "data.licence=CC-BY-NC-4.0"]) == 2
    found = capfd.readouterr()
    assert "far enough" in found.err and not ray.is_initialized()
    assert "  licences data shapes: CC-BY-NC-4.0\n" in found.out
    assert "WARNING: the student inherits the terms of data shapes: CC-BY-NC-4.0, no commercial use (" in found.out


def test_the_permissive_teacher() -> None:
    (table,) = request_of("losses", "--preset", "coco", "--teacher", "permissive").tables
    teachers = [recipe.teacher for recipe in table.recipes.values()]
    assert {teacher.kind for teacher in teachers} == {"grounded_sam"}
    assert table.settings["teacher.kind"] == "grounded_sam"
    names = list(teachers[0].checkpoint_fields().values())
    assert [CHECKPOINTS[name].licence.id for name in names] == ["Apache-2.0", "Apache-2.0"]


@pytest.mark.parametrize("command", [ablate.main, search.main])
def test_another_teacher_than_the_permissive_one_is_refused(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--teacher", "permissive", "--out", str(tmp_path / "runs")]
    assert command(["losses", *asked, "--set", "teacher.kind=sam3"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message == (
        "error: --teacher permissive and --set teacher.kind=sam3: expected teacher.kind=grounded_sam, or only one of "
        "the two"
    )
    table = {"metric": "student/mask_ap", "baseline": "a", "rows": {"a": {"teacher.kind": "mask2former"}}}
    space = {
        "objectives": {"student/mask_ap": "max"},
        "space": {"teacher.kind": {"choices": ["grounded_sam", "mask2former"]}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"title": "t"} | (table if command is ablate.main else space)))
    assert command([str(tmp_path / "mine.yaml"), *asked]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: --teacher permissive and a row or trial with teacher.kind=mask2former: expected ")


def test_rows_of_several_tables() -> None:
    request = request_of("losses", "stages", "--rows", "losses:sup", "full", "no-adapt")
    assert [[row for row, _ in table.recipes] for table in request.tables] == [["sup"], ["full", "no-adapt"]]
    assert [table.name for table in request.tables] == ["losses-shapes-demo", "stages-shapes-demo"]
    only = request_of("losses", "stages", "--rows", "full", "--name", "mine")
    assert [table.name for table in only.tables] == ["mine-stages"]
    assert [table.name for table in request_of("losses", "--name", "mine").tables] == ["mine"]


def test_flags_reach_the_request() -> None:
    request = request_of(
        *("losses", "--max-concurrent", "3", "--workers-per-trial", "2", "--budget-hours", "1.5", "--keep-going"),
        *("--price-per-gpu-hour", "2", "--seeds", "4", "5", "--out", "there", "--set", "loss.lambda_pxl=0.3"),
    )
    (table,) = request.tables
    assert {seed for _, seed in table.recipes} == {4, 5}
    runtime = table.recipes["sup+semi+pxl", 4].runtime
    assert (runtime.max_concurrent_stages, runtime.num_workers, runtime.is_elastic) == (3, 2, False)
    elastic = request_of("losses", "--workers-per-trial", "1:2").tables[0].recipes["sup", 0].runtime
    assert (elastic.min_workers, elastic.num_workers, elastic.is_elastic) == (1, 2, True)
    assert table.recipes["sup+semi+pxl", 4].loss.lambda_pxl == 0.3
    assert (request.budget_hours, request.prices, request.keep_going) == (1.5, Prices({ANY: 2.0}), True)
    assert request.trackers.tensorboard == {"losses": "there/losses-shapes-demo/tensorboard"}
    assert request_of("losses", "--no-tensorboard").trackers.tensorboard == {}


def test_a_tables_own_preset_and_scale(tmp_path: Path) -> None:
    spec = {
        "title": "t",
        "metric": "student/mask_ap",
        "baseline": "a",
        "rows": {"a": {}},
        "base": {"preset": "coco", "scale": "full"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    mine = str(tmp_path / "mine.yaml")
    assert request_of(mine).tables[0].name == "mine-coco-full"
    assert request_of(mine, "--scale", "smoke").tables[0].name == "mine-coco-smoke"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["losses", "losses"], "tables: expected different names"),
        (["losses", "stages", "--rows", "none"], "no row of losses, stages is called none"),
        (["losses", "--rows", "sup+sem"], "unknown row 'sup\\+sem'"),
        (["losses", "--seeds", "0", "0"], "--seeds: expected different numbers"),
    ],
)
def test_bad_requests(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_of(*arguments)


@pytest.mark.parametrize("command", [ablate.main, search.main])
@pytest.mark.parametrize("uri", ["gopher://bucket/runs", "s3://"])
def test_results_do_not_go_to_a_uri_of_no_known_kind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: Callable[..., int],
    uri: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["losses", "--scale", "smoke", "--out", uri]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --out {uri}: ")
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_many_tables_fits_a_folder() -> None:
    assert sweep_name(["losses-shapes-demo"]) == "losses-shapes-demo"
    assert len(sweep_name([f"{name}-shapes-demo" for name in table_names()])) < 60


def _code(arguments: list[str]) -> int:
    try:
        return cast_ray_main(["ablate", *arguments])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("name", ["a/b", "../x", ".", "", "y/", "x" * 300])
def test_a_run_is_named_by_one_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(["losses", "--dry-run", "--name", name]) == 2
    assert "--name: expected a name of 1 to 120 characters" in capsys.readouterr().err


def test_a_seed_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(["losses", "--dry-run", "--set", "seed=3"]) == 2
    assert "seed: expected --seeds" in capsys.readouterr().err


def test_a_row_that_none_of_several_tables_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(["losses", "main", "--dry-run", "--rows", "sup", "nope"]) == 2
    assert "no row of losses, main is called nope" in capsys.readouterr().err


def test_samplers_that_are_none_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cast_ray_main(["search", "losses", "--samplers", "foo"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "samplers" in line and "'tpe' or 'random'" in line
