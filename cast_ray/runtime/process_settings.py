"""Settings of a process that moves images all day: one thread each, and memory that is kept."""

from __future__ import annotations

import ctypes
from functools import lru_cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT_BYTES = 1 << 30


@lru_cache(maxsize=1)
def prepare_process(num_threads: int = 1) -> None:
    """Thread counts of image and tensor kernels, and an allocator that keeps what is freed.

    glibc hands large blocks back to the kernel at once and gets them back zeroed, page by page: of a batch of 512x1024
    crops that is a tenth of the CPU time in a decoding task, and most of it in the process that unpacks its masks.
    """
    import torch

    from cast_ray.data.views import use_one_thread

    use_one_thread()
    torch.set_num_threads(num_threads)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)  # other threads' arenas hold no block above 64 MB
