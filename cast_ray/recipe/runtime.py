"""Where and how wide it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cast_ray.recipe.part import Part


class RuntimeConfig(Part):
    """Where and how wide it runs. Nothing here enters a fingerprint: it must not change a result."""

    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    cpus_per_worker: float = Field(0.5, gt=0)
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    num_labellers: int = Field(0, ge=0)
    """Actors of a labelling job of its own; 0: a row's Train workers label, each a part, without a further start."""
    cpus_per_labeller: float = Field(0.5, gt=0)
    cpus_per_read: float = Field(0.2, gt=0)
    """Of one decoding task; a stream runs two at a time."""
    stream_memory_mb: int = Field(256, ge=16)
    """Object-store memory of one worker's stream: how far it may read ahead of training."""
    max_concurrent_stages: int = Field(0, ge=0)
    """Worker groups and labelling jobs at a time; 0: as many as the cluster's resources hold."""
    max_failures: int = Field(3, ge=0)
    """Times a stage's workers are restarted from the last checkpoint before its row fails."""
