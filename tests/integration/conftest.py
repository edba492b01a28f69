"""A Ray of a module's own, small and with nothing that a test does not need."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

LOGICAL_CPUS = 3


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(
        "local",
        num_cpus=LOGICAL_CPUS,
        object_store_memory=512 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="cast_ray",
    )
    yield
    ray.shutdown()
