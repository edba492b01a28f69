"""Two gloo workers that train a decoder with batch norm against one worker with the joint batch."""

from __future__ import annotations

import os
import socket
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from training_scenes import MODEL, NUM_CLASSES, make_batch, slice_batch

from cast_ray.engine.world import World
from cast_ray.models.batch_norm import JointBatchNorm
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter

IMAGES, STEPS = 4, 3
RELEASED = MODEL.model_copy(update={"decoder": "dpt-released", "proposals": False})


def train(world: World) -> dict[str, Any]:
    """Gradients of the first step, and the state after a few steps of plain descent on a loss of the outputs."""
    network = CastNetwork(build_segmenter(RELEASED, NUM_CLASSES, seed=0), None)
    wrapped = world.wrap(network.train())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    gradients: dict[str, torch.Tensor] = {}
    share = IMAGES // world.size
    for step in range(STEPS):
        batch = make_batch((1, 2, 3, 4), IMAGES, seed=step)
        mine = slice_batch(batch, slice(world.rank * share, (world.rank + 1) * share), slice(0, 0))
        predictions = wrapped(mine.weak).predictions
        outputs = chain(predictions.class_logits, predictions.mask_logits)
        # DDP takes the mean over workers: the loss is a mean over images.
        loss = sum((x - 0.3).square().flatten(1).mean(1).mean() for x in outputs)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
    network.eval()
    with torch.no_grad():
        predicted = network(make_batch((1, 2), 2, seed=9).weak).predictions.mask_logits[-1]
    return {"gradients": gradients, "state": network.state_dict(), "predicted": predicted}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(train(World(rank, 2)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_workers_have_the_statistics_and_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    wanted = train(World())
    largest = max(float(g.abs().max()) for g in wanted["gradients"].values())
    statistics = [n for n in wanted["state"] if "running_" in n]
    assert largest > 0.01 and len(statistics) == 2 * 10
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in wanted["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)
        for name in statistics:
            torch.testing.assert_close(found["state"][name], wanted["state"][name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["predicted"], wanted["predicted"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("counts", [(4,), (3, 1), (1, 1, 2)])
def test_joint_statistics_equal_torchs_of_the_whole_batch(counts: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(4, 5, 6, 7, generator=g)).requires_grad_()
    torchs, joint = nn.BatchNorm2d(5), [JointBatchNorm(5) for _ in counts]
    for module in (torchs, *joint):
        nn.init.constant_(module.weight, 1.5)
        nn.init.constant_(module.bias, 0.5)
    wanted = torchs(x)
    parts = x.split(counts)
    # What all workers would gather, in one process: each part's statistics, as the module itself computes them.
    sent: list[torch.Tensor] = []

    def collect(stats: torch.Tensor) -> torch.Tensor:
        sent.append(stats)
        return stats

    for module, part in zip(joint, parts):
        module.gather = collect
        module(part)
    everything = torch.cat(sent)
    found = []
    for module, part in zip(joint, parts):
        module.reset_running_stats()
        module.gather = lambda stats: everything
        found.append(module(part))
    torch.testing.assert_close(torch.cat(found), wanted)
    for module in joint:
        torch.testing.assert_close(module.running_mean, torchs.running_mean)
        torch.testing.assert_close(module.running_var, torchs.running_var)
    weight = torch.randn(wanted.shape, generator=g)
    (mine,) = torch.autograd.grad((torch.cat(found) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
