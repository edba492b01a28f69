"""Two gloo workers that train a published segmentation model as a student against one worker with the joint batch."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_checkpoints import PUBLISHED_SETTINGS, write_mask_transformer
from training_scenes import CONTRAST, LOSS, NUM_CLASSES, make_batch, slice_batch

from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.published import KINDS
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import ModelConfig

# 1 instance of D_l on the first worker, 7 on the second; one image of D_u without any.
COUNTS, NUM_LABELLED = (1, 7, 4, 0), 2
# No draw in it: all pixels are anchors and candidates, and the expectation stands for the negatives.
EXACT = CONTRAST.model_copy(
    update={"estimator": "expectation", "num_anchors": None, "pool_size": None, "feature_stride": 16}
)


def gradients(kind: str, folder: Path, world: World) -> dict[str, torch.Tensor]:
    """Of the first step, before clipping, averaged over workers as DDP does."""
    settings: dict[str, Any] = PUBLISHED_SETTINGS[kind]
    segmenter = build_segmenter(ModelConfig(**settings, checkpoint=str(folder / kind)), NUM_CLASSES, seed=0)
    torch.manual_seed(0)
    network = CastNetwork(segmenter, EXACT)
    wrapped = world.wrap(network.train())
    loss = LOSS.model_copy(update={"lambda_semi": 0.5})
    objective = Objective(loss, EXACT, WorkerGather(world.rank, world.size), proposals=False)
    share = len(COUNTS) // 2 // world.size
    labelled = slice(world.rank * share, (world.rank + 1) * share)
    unlabelled = slice(NUM_LABELLED + world.rank * share, NUM_LABELLED + (world.rank + 1) * share)
    batch = slice_batch(make_batch(COUNTS, NUM_LABELLED), labelled, unlabelled)
    terms, _ = objective(wrapped(batch.weak, batch.strong), batch, 0, torch.Generator())
    total, _ = weighted_sum(terms, objective.weights, world.all_reduce_sum, world.size)
    total.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {kind: gradients(kind, Path(folder), World(rank, 2)) for kind in KINDS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_workers_give_the_gradients_of_one(tmp_path: Path) -> None:
    for kind in KINDS:
        file = write_mask_transformer(tmp_path / kind, kind) / "config.json"
        config = json.loads(file.read_text())
        # Nothing may be random: the workers draw apart.
        if kind == "mask2former":
            config["backbone_config"]["drop_path_rate"] = 0.0
        else:
            config["pos_embed_rescale"] = None  # of DINOv3's positions in training
        file.write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in KINDS:
        wanted = gradients(kind, tmp_path, World())
        largest = max(float(g.abs().max()) for g in wanted.values())
        assert largest > 0.01 and any("class_head" in n for n in wanted) and any("projector" in n for n in wanted)
        for found in (each[kind] for each in workers):
            assert set(wanted) <= set(found)
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-4 * largest, msg=name)
