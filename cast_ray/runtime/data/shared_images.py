"""The folder of each node in which the processes of a job share the images that they have fetched."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import ray

from cast_ray.data.reading.recent_files import SharedFiles, remove_forgotten


@lru_cache(maxsize=1)
def share_images() -> None:
    """Lets this process, one of Ray's, take images from those that others of its job have fetched on this node."""
    from cast_ray.data.reading import images

    folder = _folder()
    remove_forgotten(folder.parent, _prefix())
    images.shared = SharedFiles(folder)


def forget_shared_images() -> None:
    """Removes what was shared on this node; other nodes do so when the next job comes."""
    if ray.is_initialized():  # asking for the job would start a Ray
        shutil.rmtree(_folder(), ignore_errors=True)


def _folder() -> Path:
    context = ray.get_runtime_context()
    return Path(tempfile.gettempdir()) / f"{_prefix()}{context.get_node_id()[:16]}-{context.get_job_id()}"


def _prefix() -> str:
    return f"cast_ray-images-{os.getuid()}-"
