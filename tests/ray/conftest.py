"""A Ray of a module's own, small and with nothing that a test does not need."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator

import pytest
import ray

LOGICAL_CPUS = 3


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The processes of Ray import what tests import (pyproject.toml, pythonpath), for tasks that a test module defines.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(
            "local",
            num_cpus=LOGICAL_CPUS,
            object_store_memory=512 << 20,
            include_dashboard=False,
            log_to_driver=False,
            namespace="cast_ray",
        )
    yield
    # Threads of streams that a test gave up end with their iterators; one that came late would find no Ray, which then
    # ends this process without a word.
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "iter_threaded":
            thread.join(10)
    ray.shutdown()
