"""Two gloo workers against one process with the joint batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrastive_scenes import gradients, scene

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.engine.collectives import WorkerGather
from cast_ray.losses.contrastive.loss import contrastive_loss
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.set.criterion import LossPoints, set_loss
from cast_ray.recipe import ContrastiveConfig, LossConfig

CONTRASTIVE = [
    ContrastiveConfig(estimator="expectation", kind=kind, scope=scope, sampler=sampler)
    for kind, scope, sampler in (
        ("cast", "batch", "fusion"),
        ("cast", "cross-image", "class"),
        ("cast", "same-image", "fusion"),
        ("cast", "batch", "oracle"),
        ("infonce", "batch", "uniform"),
        ("supervised", "batch", "uniform"),
    )
]
# Draws without replacement of all candidates are the same on one and on two workers.
CONTRASTIVE.append(ContrastiveConfig(sampler="class", scope="cross-image", replacement=False, num_negatives=200))
SET = LossConfig(num_points=32, pseudo_weighting="score")
COUNTS = (1, 7)


def make_images():
    """Two images, one for each worker, with padding in one so that their anchor counts differ."""
    inputs = scene(images=2)
    inputs["valid"][1, :, 8:] = False
    return inputs


def make_set_problem():
    g = torch.Generator().manual_seed(0)
    predictions = Predictions(
        [torch.randn(2, 9, 4, generator=g).requires_grad_() for _ in range(2)],
        [torch.randn(2, 9, 8, 8, generator=g).requires_grad_() for _ in range(2)],
        {},
        {},
    )
    targets = [
        Targets(
            torch.rand(n, 32, 32, generator=g) < 0.5,
            torch.randint(0, 3, (n,), generator=g),
            0.3 + 0.5 * torch.rand(n, generator=g),
        )
        for n in COUNTS
    ]
    points = LossPoints(*(2 * torch.rand(*shape, 2, generator=g) - 1 for shape in ((2, 2, 32), (2, 8, 96), (2, 8, 8))))
    return predictions, targets, points


def set_gradients(predictions, losses, reduce):
    total = sum(s.sum() / reduce(n.sum()) for s, n in losses.values())
    return torch.autograd.grad(total, predictions.class_logits + predictions.mask_logits)


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def summed(tensor):
        dist.all_reduce(tensor)
        return tensor

    results = []
    for config in CONTRASTIVE:
        mine = {
            name: value.detach()[rank : rank + 1].clone().requires_grad_(value.requires_grad)
            for name, value in make_images().items()
        }
        out = contrastive_loss(PixelViews(**mine), config=config, temperature=0.2, gather=WorkerGather(rank, 2))
        # Summed over workers, without DDP's averaging: a worker's own gradient is that of the joint mean.
        mean = out.sum / summed(out.count.clone()).clamp(min=1)
        results.append((out.sum.detach(), out.count, gradients(mine, mean)))
    predictions, targets, points = make_set_problem()
    part = predictions.part(rank, rank + 1)
    pairs = slice(0, 1) if rank == 0 else slice(1, 8)
    share = LossPoints(points.match[:, rank : rank + 1], points.candidates[:, pairs], points.uniform[:, pairs])
    losses = set_loss(part, targets[rank : rank + 1], SET, points=share)
    torch.save((results, set_gradients(predictions, losses, summed)), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CONTRASTIVE)))
def test_gathered_pool_gives_the_joint_batch(workers, number):
    inputs = make_images()
    joint = contrastive_loss(PixelViews(**inputs), config=CONTRASTIVE[number], temperature=0.2)
    wanted = gradients(inputs, joint.sum / joint.count)
    (sum_0, count_0, grads_0), (sum_1, count_1, grads_1) = (w[0][number] for w in workers)
    torch.testing.assert_close(sum_0 + sum_1, joint.sum.detach())
    assert count_0 + count_1 == joint.count > 0 and count_0 != count_1
    for a, b, both in zip(grads_0, grads_1, wanted):
        torch.testing.assert_close(torch.cat([a, b]), both, rtol=1e-5, atol=1e-6)


def test_one_and_seven_instances_on_two_workers_are_eight_on_one(workers):
    predictions, targets, points = make_set_problem()
    wanted = set_gradients(predictions, set_loss(predictions, targets, SET, points=points), lambda n: n)
    for a, b, both in zip(workers[0][1], workers[1][1], wanted):
        torch.testing.assert_close(a + b, both, rtol=1e-5, atol=1e-6)
