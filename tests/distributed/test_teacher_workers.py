"""Two gloo workers that fine-tune a detector with a segmenter against one worker with the joint batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from teacher_scenes import CATEGORIES, CONTRAST
from tiny_checkpoints import write_detector, write_sam2
from training_scenes import make_batch, slice_batch

from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.recipe import LossConfig, TeacherConfig
from cast_ray.teachers.grounded_sam import DETECTOR, SEGMENTER, GroundedSamTeacher

# 1 instance of D_l on the first worker, 7 on the second; one image of D_u without any.
COUNTS, NUM_LABELLED = (1, 7, 4, 0), 2
EXACT = CONTRAST.model_copy(
    update={"estimator": "expectation", "num_anchors": 10_000, "pool_size": 10_000, "gather": True}
)


def gradients(folder: Path, world: World) -> dict[str, torch.Tensor]:
    """Of the first step, before clipping, averaged over workers as DDP does."""
    config = TeacherConfig(kind="grounded_sam")
    folders = {DETECTOR: folder / "detector", SEGMENTER: folder / "segmenter"}
    teacher = GroundedSamTeacher.load(folders, config, CATEGORIES, (32, 32))
    torch.manual_seed(0)
    network, terms = teacher.for_training(EXACT)
    wrapped = world.wrap(network.train())
    objective = Objective(LossConfig(lambda_semi=0.5), EXACT, WorkerGather(world.rank, world.size), terms)
    share = len(COUNTS) // 2 // world.size
    labelled = slice(world.rank * share, (world.rank + 1) * share)
    unlabelled = slice(NUM_LABELLED + world.rank * share, NUM_LABELLED + (world.rank + 1) * share)
    batch = slice_batch(make_batch(COUNTS, NUM_LABELLED), labelled, unlabelled)
    output = wrapped(batch.weak, batch.strong, batch.targets)
    found, _ = objective(output, batch, 0, torch.Generator())
    loss, _ = weighted_sum(found, objective.weights, world.all_reduce_sum, world.size)
    loss.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(gradients(Path(folder), World(rank, 2)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_one_and_seven_instances_give_the_gradients_of_eight(tmp_path: Path) -> None:
    # nothing may be dropped at random: the workers draw apart
    write_detector(tmp_path / "detector", "mm", ("person", "traffic", "light", "dog"), dropout=0.0, fusion_droppath=0.0)
    write_sam2(tmp_path / "segmenter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    wanted = gradients(tmp_path, World())
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0.01 and any("mask_decoder" in n for n in wanted) and any("projector" in n for n in wanted)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(wanted) <= set(found)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_a_step_without_instances_still_gives_every_part_a_gradient(tmp_path: Path, counts: tuple[int, int]) -> None:
    write_detector(tmp_path / "detector")
    write_sam2(tmp_path / "segmenter")
    folders = {DETECTOR: tmp_path / "detector", SEGMENTER: tmp_path / "segmenter"}
    teacher = GroundedSamTeacher.load(folders, TeacherConfig(kind="grounded_sam"), CATEGORIES, (32, 32))
    network, terms = teacher.for_training(CONTRAST)
    objective = Objective(LossConfig(lambda_semi=1.0), CONTRAST, None, terms)
    batch = make_batch(counts, 1)
    output = network(batch.weak, batch.strong, batch.targets)
    found, _ = objective(output, batch, 0, torch.Generator())
    loss, means = weighted_sum(found, objective.weights, lambda t: t, 1)
    loss.backward()
    assert loss.isfinite() and means.isfinite().all()
    decoder = [p for n, p in network.named_parameters() if "model.decoder.layers" in n and p.requires_grad]
    assert all(p.grad is not None for p in decoder)
