"""Folders of results in an object store, and the reports that are written there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs
from report_scenes import result, save
from s3_server import BUCKET, S3Server

from cast_ray.cli import ablate, report
from cast_ray.cli.options import EXIT_BAD_INPUT, runs_place
from cast_ray.common import paths
from cast_ray.common.paths import below, parent_and_name, read_bytes, write_bytes
from cast_ray.common.results_folder import ResultsFolder, copy_results, open_results
from cast_ray.plan.ablation import load_table
from cast_ray.report.run_folder import write_plan

RUNS = f"s3://{BUCKET}/runs"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        # The environment names another server than that of the test before.
        monkeypatch.setattr(paths, "_filesystem", paths._filesystem.__wrapped__)
        yield server


def stored(server: S3Server, folder: str) -> set[str]:
    found = server.filesystem().get_file_info(fs.FileSelector(f"{BUCKET}/{folder}", recursive=True))
    return {info.path.removeprefix(f"{BUCKET}/{folder}/") for info in found if info.is_file}


def test_what_is_new_or_changed_is_sent(server: S3Server) -> None:
    write_bytes(f"{RUNS}/mine/report.html", b"before")
    write_bytes(f"{RUNS}/other/report.html", b"other")
    with open_results(RUNS) as results:
        assert results.is_remote and results.names() == ["mine", "other"]
        results.fetch(["mine", "missing"])
        page = results.path / "mine/report.html"
        assert page.read_bytes() == b"before" and not (results.path / "other").exists()
        server.reset()
        results.send()
        assert not server.requests
        (results.path / "mine/row").mkdir()
        (results.path / "mine/row/result.json").write_text("{}")
        page.write_text("after that")
        results.send()
        assert server.requests == {"PUT": 2}
        assert results.at(page) == f"{RUNS}/mine/report.html"
        here = results.path
    assert not here.exists() and read_bytes(f"{RUNS}/mine/report.html") == b"after that"
    assert stored(server, "runs") == {"mine/report.html", "mine/row/result.json", "other/report.html"}


def test_options_of_a_uri_stay_at_its_end(server: S3Server) -> None:
    place = server.uri("runs")
    with open_results(place) as results:
        (results.path / "a").write_text("1")
        results.send()
        assert results.at(results.path / "a") == below(place, "a") and read_bytes(below(place, "a")) == b"1"
    assert parent_and_name(below(place, "x")) == (place, "x")
    assert parent_and_name("s3://b/runs/x/") == ("s3://b/runs", "x")


def test_messages_name_the_uri(server: S3Server) -> None:
    with pytest.raises(ValueError, match=rf"^{RUNS}/x: no such folder$"), open_results(RUNS) as results:
        raise ValueError(f"{results.path / 'x'}: no such folder")
    with (
        pytest.raises(ValueError, match=r"^s3://none/runs: cannot be written: "),
        open_results("s3://none/runs") as other,
    ):
        (other.path / "a").write_text("1")
        other.send()


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with open_results(str(tmp_path)) as results:
        results.fetch(["a"])
        results.send()
        assert (results.path, results.at(tmp_path / "a"), results.names()) == (tmp_path, str(tmp_path / "a"), [])


def test_a_copy_replaces_nothing(server: S3Server, tmp_path: Path) -> None:
    write_bytes(f"{RUNS}/mine/row/result.json", b"{}")
    copy_results(f"{RUNS}/mine", tmp_path / "copy")
    assert (tmp_path / "copy/row/result.json").read_text() == "{}"
    with pytest.raises(ValueError, match="expected a folder that is missing or empty"):
        copy_results(f"{RUNS}/mine", tmp_path / "copy")
    with pytest.raises(ValueError, match=f"{RUNS}/none: no such folder"):
        copy_results(f"{RUNS}/none", tmp_path / "other")


def test_in_a_job_results_go_below_the_storage_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_place(None, "s3://bucket/storage") == "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runs_place(None, str(tmp_path / "storage")) == str(tmp_path / "storage/runs")
    assert runs_place("mine", "s3://bucket/storage") == "mine"
    assert runs_place(f"file://{tmp_path}/a", "x") == str(tmp_path / "a")


def test_a_report_is_rebuilt_where_it_is_and_fetched(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a job leaves it: results and the plan, no page."""
    with open_results(RUNS) as results:
        save(results.path / "mine", [result("sup")])
        expected = [("losses", row, 0) for row in ("sup", "sup+semi")]
        write_plan(results.path / "mine", [load_table("losses")], expected, f"s3://{BUCKET}/storage/runs/mine")
        results.send()
    # A row that ended after the command was killed is in the store only.
    write_bytes(
        f"s3://{BUCKET}/storage/runs/mine/losses__sup+semi__s0/result.json", json.dumps(result("sup+semi")).encode()
    )
    assert report.main([f"{RUNS}/mine"]) == 0
    assert f"Report: {RUNS}/mine/report.html" in capsys.readouterr().out
    assert {"report.html", "report.md", "report.json", "losses__sup+semi__s0/result.json"} <= stored(
        server, "runs/mine"
    )
    assert report.main([f"{RUNS}/mine", "--out", str(tmp_path / "copy")]) == 0
    assert "15.8" in (tmp_path / "copy/report.md").read_text()
    assert report.main([f"{RUNS}/none"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {RUNS}/none: no such folder\n"


def test_runs_of_other_settings_are_told_apart_there(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = load_table("losses")
    with open_results(RUNS) as results:
        name = "losses-shapes-smoke"
        write_plan(results.path / name, [table], [], settings={"losses": table.settings("shapes", "smoke")})
        results.send()

    def request(*arguments: str) -> tuple[str, str]:
        read = ablate._parser().parse_args(["losses", "--scale", "smoke", *arguments])
        with open_results(RUNS) as results:
            (chosen,) = ablate._request(read, results).tables
        return chosen.name, chosen.folder

    assert request() == ("losses-shapes-smoke", f"{RUNS}/losses-shapes-smoke")
    other, folder = request("--set", "stages.refine.lr=0.01")
    assert other.startswith("losses-shapes-smoke-") and f"because {RUNS}/losses-shapes-smoke holds other" in folder


def test_a_local_runs_folder_is_known_by_its_path(tmp_path: Path) -> None:
    assert ResultsFolder("runs", Path("runs")).at(Path("runs/x")) == "runs/x"
