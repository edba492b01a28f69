"""`cast-ray store run` runs one stored stage again in this process and compares the outcome with the stored one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cast_ray.cli.options import EXIT_FAILED, exit_code, interruptible
from cast_ray.runtime.store.artifact_files import CURVES, LABELS, METRICS
from cast_ray.runtime.store.artifacts import ArtifactStore

if TYPE_CHECKING:
    import torch

    from cast_ray.runtime.worker.agreement import Difference
    from cast_ray.runtime.worker.stored_stage import StoredStage

NUM_SHOWN = 10
"""Differences that are printed."""
DESCRIPTION = """Runs one stored stage again in this process, for a debugger: `python -m pdb -m cast_ray store run KEY`
stops where an error is raised, and breakpoint() works in losses, views and models. Nothing in the store changes. A
train stage starts at its first step, from the stored parents, and prints its loss beside the stored one; a label stage
labels its images, an evaluate stage measures its model, and both compare. The exit code is 1 where the outcome differs
from the stored one. The same as in the sweep are the code, the images and their order, the views, the random numbers,
the parents, the precision, and batch statistics, which are those of a whole step. Not the same: there is no Ray; one
worker takes whole steps, where several shared them and drew other random points, so that the losses of a stage of
several workers differ from the first step on; one thread computes; there are no checkpoints, no
runtime.gradient_checkpointing, no stages.*.accumulate and no validation beside training."""


@dataclass(frozen=True)
class RerunRequest:
    """What the user asked for: see the options of `cast-ray store run`."""

    store: ArtifactStore
    key: str
    dataset_key: str | None
    stop_step: int | None
    device: str | None


def run_again(find: Callable[[], RerunRequest], console: Console) -> int:
    """Runs a stored stage again and compares; returns the exit code.

    What is wrong with the request or the stage's inputs is one line, as everywhere. An error of the stage itself is
    raised with its traceback, which is what the user is after.

    Args:
        find: gives the request, or raises ValueError.
    """
    opened: list[tuple[StoredStage, torch.device, int | None]] = []

    def prepare() -> int:
        opened.append(_open(find()))
        return 0

    if code := exit_code(prepare):
        return code
    return interruptible(lambda: _run(*opened[0], console), "stopped; nothing in the store has changed")


def _open(request: RerunRequest) -> tuple[StoredStage, torch.device, int | None]:
    from cast_ray.runtime.worker.stored_stage import open_stage

    stored = open_stage(request.store, request.key, request.dataset_key)
    if request.stop_step is not None and stored.stage.kind != "train":
        raise ValueError(f"--steps {request.stop_step}: {request.key} has no steps, expected a train stage")
    from cast_ray.engine.world import pick_device  # what needs torch, once the arguments are sound
    from cast_ray.models.autocast import require_precision
    from cast_ray.runtime.process_settings import prepare_process

    prepare_process()
    was_on_gpu = (stored.manifest.device or "").startswith("cuda")
    device = pick_device(request.device or ("cuda" if was_on_gpu else "cpu"))
    require_precision(stored.stage.precision, device, "runtime.amp")
    return stored, device, request.stop_step


def _run(stored: StoredStage, device: torch.device, stop_step: int | None, console: Console) -> int:
    manifest, num_workers = stored.manifest, stored.manifest.num_workers or 1
    console.print(
        f"{stored.stage.key}: {stored.stage.name}, stored by {manifest.owner or 'an unknown row'} "
        f"(workers: {num_workers}, device: {manifest.device or 'unknown'}); "
        f"runs again here (workers: 1, device: {device})",
        soft_wrap=True,
    )
    if num_workers > 1 and stored.stage.kind == "train":
        console.print("Losses differ from those of several workers, see cast-ray store run --help", style="yellow")
    if stored.note:
        console.print(stored.note, style="yellow", soft_wrap=True)
    if stored.stage.kind == "train":
        differences = _train(stored, device, stop_step, console)
    else:
        differences = {"label": _label, "evaluate": _evaluate}[stored.stage.kind](stored, device, console)
    for difference in differences[:NUM_SHOWN]:
        console.print(f"  {difference}", highlight=False, soft_wrap=True)
    if len(differences) > NUM_SHOWN:
        console.print(f"  and {len(differences) - NUM_SHOWN:,} more")
    return EXIT_FAILED if differences else 0


def _train(stored: StoredStage, device: torch.device, stop_step: int | None, console: Console) -> Sequence[Difference]:
    from cast_ray.runtime.worker.agreement import TOLERANCE, compare_curves
    from cast_ray.runtime.worker.rerun import train_again

    steps = min(stop_step or stored.stage.steps, stored.stage.steps)
    curve: list[dict[str, float]] = stored.store.read_json(stored.stage.key, CURVES)["curve"]
    losses = {entry["step"]: entry["loss"] for entry in curve if "loss" in entry}
    console.print(f"{'step':>8} {'loss':>12} {'stored':>12}")

    def show(entry: dict[str, float]) -> None:
        step = entry["step"]
        before = f"{losses[step]:12.6f}" if step in losses else f"{'none':>12}"
        console.print(f"{step:8} {entry['loss']:12.6f} {before}", highlight=False)

    result = train_again(stored, device, steps, show)
    compared, differences = compare_curves(curve, result.curve, steps)
    console.print(f"ran {steps:,} of {stored.stage.steps:,} steps in {result.seconds:.1f} s")
    if differences:
        console.print(f"the curve differs from the stored one, first at {differences[0].what}", highlight=False)
    elif compared:
        words = f"entries compared: {compared}, tolerance: {TOLERANCE:g} of a value"
        console.print(f"the curve is equal to the stored one ({words})", highlight=False)
    else:
        console.print(f"nothing to compare: the stored curve has no entry up to step {steps}")
    return differences


def _label(stored: StoredStage, device: torch.device, console: Console) -> Sequence[Difference]:
    from cast_ray.runtime.worker.agreement import Difference, compare_labels
    from cast_ray.runtime.worker.rerun import label_again

    again, facts = label_again(stored, device)
    differences = compare_labels(stored.store.read_table(stored.stage.key, LABELS), again)
    words = f"{facts['num_pseudo_labels']:,} labels on {facts['num_images']:,} images"
    skipped = f", {len(facts['skipped'])} images could not be read" if facts["skipped"] else ""
    outcome = f"differ on {len(differences):,} images" if differences else "are equal to the stored ones"
    console.print(f"{words}{skipped}: they {outcome}")
    thresholds: Any = getattr(stored.manifest, "class_thresholds", None)
    if thresholds != facts.get("class_thresholds"):
        differences.append(Difference("class thresholds", thresholds, facts.get("class_thresholds")))
    return differences


def _evaluate(stored: StoredStage, device: torch.device, console: Console) -> Sequence[Difference]:
    from cast_ray.runtime.worker.agreement import compare_metrics
    from cast_ray.runtime.worker.rerun import measure_again

    metrics = measure_again(stored, device)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            console.print(f"  {name:24} {value:.6g}", highlight=False)
    differences = compare_metrics(stored.store.read_json(stored.stage.key, METRICS), metrics)
    console.print(f"the metrics {'differ from' if differences else 'are equal to'} the stored ones")
    return differences
