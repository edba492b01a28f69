"""The command is killed in the middle of labelling; the same command labels what is missing and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.store.artifacts import ArtifactStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_IMAGES, NUM_LABELLED = 640, 4
SETTINGS = [
    "stages.pretrain.steps=0",
    "stages.adapt.steps=2",
    "stages.selftrain.steps=2",
    "stages.distill.steps=2",
    "stages.refine.steps=0",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("adapt", "selftrain", "distill")),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    "data.shapes.num_source=8",
    f"data.shapes.num_train={NUM_IMAGES}",
    "data.shapes.num_val=4",
    f"data.label_fraction={NUM_LABELLED / NUM_IMAGES}",
    "pseudo.score_threshold=0.0",
]
ARGUMENTS = ["--rows", "sup+semi", *(part for setting in SETTINGS for part in ("--set", setting))]


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "storage/artifacts").glob("label-*/manifest.json")]
    return {manifest["stage"]: manifest for manifest in found}


def blocks(folder: Path) -> dict[str, int]:
    """Block that is written -> when, of the labelling that is going on."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / "storage/labels").glob("*/*.parquet")}


def labels(folder: Path, stage: str) -> list[dict[str, Any]]:
    store = ArtifactStore(str(folder / "storage"))
    return store.read_table(artifact_key("label", manifests(folder)[stage]["fingerprint"]), "labels").to_pylist()


def images_in(files: Any) -> int:
    spans = [Path(file).name.removesuffix(".parquet").split("-") for file in files]
    return sum(int(stop) - int(start) for start, stop in spans)


def test_killed_labelling_goes_on_with_what_is_missing(tmp_path: Path, start_sweep: Any, wait_until: Any) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    sweep = start_sweep(killed, *ARGUMENTS)
    wait_until(lambda: len(blocks(killed)) >= 2 or sweep.process.poll() is not None, "no block was written")
    assert sweep.process.poll() is None, sweep.output
    for process in sweep.processes():
        sweep.kill_process(process)  # workers too: the command alone would let them finish
    wait_until(lambda: not sweep.processes(), "Ray outlived the command that started it", 180)
    written = blocks(killed)
    assert 0 < images_in(written) < NUM_IMAGES - NUM_LABELLED
    assert manifests(killed) == {}

    again = start_sweep(killed, *ARGUMENTS)
    rewritten: set[str] = set()

    def look() -> bool:
        now = blocks(killed)
        rewritten.update(path for path, when in now.items() if path in written and written[path] != when)
        return again.process.poll() is not None

    wait_until(look, "the second run did not end")
    assert again.finish() == 0, again.output
    assert not rewritten and blocks(killed) == {}
    facts = manifests(killed)["label-adapted"]
    assert facts["num_found"] == images_in(written)
    assert facts["num_images"] == NUM_IMAGES - NUM_LABELLED and facts["skipped"] == []
    assert manifests(killed)["label-teacher"]["num_found"] == 0

    uninterrupted = start_sweep(whole, *ARGUMENTS)
    assert uninterrupted.finish() == 0, uninterrupted.output
    for stage in ("label-adapted", "label-teacher"):
        assert manifests(whole)[stage]["fingerprint"] == manifests(killed)[stage]["fingerprint"]
        assert without_paths(labels(whole, stage)) == without_paths(labels(killed, stage)), stage


def without_paths(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "uri"} for row in rows]
