"""Two gloo workers through the training loop against one worker with the joint batch."""

from __future__ import annotations

import copy
import math
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_scenes import CONTRAST, LOSS, batches, make_batch, make_network, run, slice_batch

from cast_ray.contracts.records import Batch
from cast_ray.engine import objective as objective_module
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.losses.set.criterion import LossPoints, set_loss
from cast_ray.recipe import TrainConfig

# One image of each kind on each worker; 1 instance of D_l on the first, 7 on the second.
COUNTS = (1, 7, 4, 0)
NUM_LABELLED = 2
STEPS = 4
CONFIG = TrainConfig(steps=STEPS, lr=1e-2, ema=0.5, checkpoint_every_steps=2)
SEMI = LOSS.model_copy(update={"lambda_semi": 0.5})
# No draw in it: all pixels are anchors and candidates, and the expectation stands for the negatives.
EXACT = CONTRAST.model_copy(
    update={"estimator": "expectation", "num_anchors": None, "pool_size": None, "feature_stride": 4}
)
SAMPLED = CONTRAST.model_copy(update={"feature_stride": 4, "diagnostics_every_steps": 0})
DRAWN = {
    "drawn points": None,
    "drawn negatives": SAMPLED,
    "drawn negatives, released form": SAMPLED.model_copy(update={"replacement": False}),
    "drawn negatives of the own image": SAMPLED.model_copy(update={"scope": "same-image"}),
}
"""Cases whose random numbers are drawn as in a sweep."""
CASES = {"set loss": None, "with the contrastive term": EXACT, **DRAWN}


def set_loss_at_shared_points(predictions: Any, targets: Any, config: Any, **options: Any) -> Any:
    """The set loss at points that are the same for every image and instance, whichever worker holds them."""
    g = torch.Generator().manual_seed(7)
    layers, images = len(predictions.class_logits), len(targets)
    pairs = sum(min(predictions.class_logits[0].shape[1], len(t.labels)) for t in targets)
    shapes = ((images, config.num_points), (pairs, 3 * config.num_points), (pairs, config.num_points // 4))
    points = [(2 * torch.rand(1, 1, n, 2, generator=g) - 1).expand(layers, rows, n, 2) for rows, n in shapes]
    return set_loss(predictions, targets, config, valid=options["valid"], points=LossPoints(*points))


def points_of(name: str) -> AbstractContextManager[Any]:
    """Where the set loss of a case compares masks: at drawn points, or at those that all images share."""
    if name in DRAWN:
        return nullcontext()
    return mock.patch.object(objective_module, "set_loss", set_loss_at_shared_points)


def share(batch: Batch, rank: int, size: int) -> Batch:
    """As the sampling plan cuts a step: each worker gets its part of D_l and of D_u."""
    labelled, unlabelled = NUM_LABELLED // size, (len(COUNTS) - NUM_LABELLED) // size
    first = NUM_LABELLED + rank * unlabelled
    return slice_batch(batch, slice(rank * labelled, (rank + 1) * labelled), slice(first, first + unlabelled))


def gradients_of(name: str, world: World) -> dict[str, torch.Tensor]:
    """Gradients of the first step, before clipping, averaged over workers as DDP does."""
    contrastive = CASES[name]
    network = make_network(contrastive)
    wrapped = world.wrap(network)
    objective = Objective(SEMI, contrastive, WorkerGather(world.rank, world.size))
    batch = share(make_batch(COUNTS, NUM_LABELLED), world.rank, world.size)
    output = wrapped(batch.weak, batch.strong if contrastive else None)
    terms, _ = objective(output, batch, 0, torch.Generator())
    loss, _ = weighted_sum(terms, objective.weights, world.all_reduce_sum, world.size)
    loss.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def train(name: str, world: World) -> dict[str, Any]:
    contrastive = CASES[name]
    objective = Objective(SEMI, contrastive, WorkerGather(world.rank, world.size))
    stream = (share(b, world.rank, world.size) for b in batches(0, STEPS, COUNTS, NUM_LABELLED))
    trained = run(CONFIG, stream, contrastive=contrastive, world=world, objective=objective)
    state = copy.deepcopy(vars(trained.states[0]))  # a run that resumes from it changes it
    resumed = run(
        CONFIG,
        (share(b, world.rank, world.size) for b in list(batches(0, STEPS, COUNTS, NUM_LABELLED))[2:]),
        contrastive=contrastive,
        world=world,
        objective=objective,
        resume=trained.states[0],
    )
    parted = run(
        CONFIG.model_copy(update={"accumulate": 2}),
        (share(b, world.rank, world.size) for b in batches(0, STEPS, COUNTS, NUM_LABELLED)),
        contrastive=contrastive,
        world=world,
        objective=objective,
    )
    return {
        "weights": trained.network.state_dict(),
        "state": state,
        "parted": parted.network.state_dict(),
        "resumed": resumed.network.state_dict(),
        "curve": trained.curve,
        "diagnostics": trained.result.diagnostics,
        "images_per_s": [e["images_per_s"] for e in trained.result.curve],
    }


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World(rank, 2)
    found = {}
    for name in CASES:
        with points_of(name):
            found[name] = (gradients_of(name, world), train(name, world))
    torch.save(found, Path(folder) / f"{rank}.pt")
    world.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_workers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def continued_alone(workers: Any) -> dict[str, Any]:
    """Weights of one worker that continues from the checkpoint of two."""
    found = {}
    for name, contrastive in CASES.items():
        with points_of(name):
            continued = run(
                CONFIG,
                (b for b in list(batches(0, STEPS, COUNTS, NUM_LABELLED))[2:]),
                contrastive=contrastive,
                objective=Objective(SEMI, contrastive),
                resume=TrainState(**workers[0][name][1]["state"]),
            )
        found[name] = continued.network.state_dict()
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {}
    for name in CASES:
        with points_of(name):
            found[name] = (gradients_of(name, World()), train(name, World()))
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_and_seven_instances_give_the_gradients_of_eight(workers: Any, alone: Any, name: str) -> None:
    wanted = alone[name][0]
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0.01
    for rank in range(2):
        found = workers[rank][name][0]
        assert set(wanted) <= set(found)
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5 * largest, msg=parameter)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_end_where_one_does(workers: Any, alone: Any, name: str) -> None:
    wanted, first = alone[name][1], make_network(CASES[name]).state_dict()
    moved = max(float((wanted["weights"][n] - first[n]).abs().max()) for n in first)
    assert moved > 1e-3
    for rank in range(2):
        for n, weight in wanted["weights"].items():
            # AdamW divides by the gradient's size, so that rounding of a tiny gradient shows in the weight.
            torch.testing.assert_close(workers[rank][name][1]["weights"][n], weight, rtol=0, atol=0.05 * moved, msg=n)


@pytest.mark.parametrize("name", CASES)
def test_one_worker_that_continues_from_the_checkpoint_of_two_ends_there(
    continued_alone: Any, alone: Any, name: str
) -> None:
    wanted, first = alone[name][1]["weights"], make_network(CASES[name]).state_dict()
    moved = max(float((wanted[n] - first[n]).abs().max()) for n in first)
    for n, weight in wanted.items():
        torch.testing.assert_close(continued_alone[name][n], weight, rtol=0, atol=0.05 * moved, msg=n)


@pytest.mark.parametrize("name", CASES)
def test_workers_that_take_their_images_in_parts_end_there_too(workers: Any, name: str) -> None:
    found, other = workers[0][name][1], workers[1][name][1]["parted"]
    first = make_network(CASES[name]).state_dict()
    moved = max(float((found["weights"][n] - first[n]).abs().max()) for n in first)
    for n, weight in found["weights"].items():
        torch.testing.assert_close(found["parted"][n], weight, rtol=0, atol=0.05 * moved, msg=n)
        assert torch.equal(found["parted"][n], other[n]), n


@pytest.mark.parametrize("name", CASES)
def test_curves_count_all_workers(workers: Any, alone: Any, name: str) -> None:
    (wanted,) = alone[name][1]["curve"]
    for rank in range(2):
        (found,) = workers[rank][name][1]["curve"]
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_diagnostics_are_of_all_workers(workers: Any, alone: Any) -> None:
    wanted = alone["with the contrastive term"][1]["diagnostics"]
    assert [d["step"] for d in wanted] == [3, 4]
    assert all(math.isfinite(value) for d in wanted for value in d.values()) and 0 < wanted[0]["fnr"] < 1
    for rank in range(2):
        for found, point in zip(workers[rank]["with the contrastive term"][1]["diagnostics"], wanted, strict=True):
            assert found == pytest.approx(point, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_workers_agree_bit_for_bit_and_resume_so(workers: Any, name: str) -> None:
    for key in ("weights", "resumed"):
        for n, weight in workers[0][name][1]["weights"].items():
            assert torch.equal(weight, workers[1][name][1][key][n]), (key, n)
