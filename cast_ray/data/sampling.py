"""The sampling plan of a train stage: which image every slot of every step uses, a pure function of the seed.

Epochs are seeded permutations laid end to end, so the short side cycles, every image of an epoch is used once, and
step k is known without running the steps before it. Slots are cut over workers, so W workers see the images that
one worker would.
"""

from __future__ import annotations

import numpy as np


def epoch_positions(num_images: int, start: int, stop: int, seed: int) -> np.ndarray:
    """Positions start..stop-1 of the endless sequence of permutations of `num_images` images: int64 [stop - start]."""
    positions = np.arange(start, stop)
    epochs, offsets = positions // num_images, positions % num_images
    chosen = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_images)
        here = epochs == epoch
        chosen[here] = order[offsets[here]]
    return chosen


def worker_slots(
    num_images: int, batch: int, start_step: int, stop_step: int, seed: int, rank: int, world_size: int
) -> np.ndarray:
    """Images of one worker's slots: int64 [stop_step - start_step, batch / world_size].

    Args:
        num_images: images to draw from; 0 gives no slots.
        batch: global batch size, a multiple of `world_size`.
    """
    assert batch % world_size == 0, (batch, world_size)
    share = batch // world_size
    if num_images == 0 or batch == 0:
        return np.empty((stop_step - start_step, 0), dtype=np.int64)
    chosen = epoch_positions(num_images, start_step * batch, stop_step * batch, seed).reshape(-1, batch)
    return chosen[:, rank * share : (rank + 1) * share]


def view_seed(stage_seed: int, step: int, slot: int) -> int:
    """Seed of the random views of one slot of the global batch, the same whichever worker holds the slot."""
    return int(np.random.SeedSequence([stage_seed, step, slot]).generate_state(1, np.uint64)[0] >> np.uint64(1))
