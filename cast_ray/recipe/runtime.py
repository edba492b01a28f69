"""Where and how wide it runs."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cast_ray.recipe.part import Part

Precision = Literal["off", "bf16", "fp16"]
"""What a stage computes in: float32, or autocast to bfloat16 or float16."""


_PAIR = re.compile(r"([\w./-]+)=(!?(?:[\w.-]+|in\([\w.-]+(?:,[\w.-]+)*\)))(?:,|$)", re.ASCII)


def parse_selector(text: str) -> dict[str, str]:
    """Reads `key=value,key=in(a,b)` as a label selector of Ray.

    Raises:
        ValueError: it is none.
    """
    rest, found = text.replace(" ", ""), {}
    while rest:
        pair = _PAIR.match(rest)
        if pair is None:
            raise ValueError(
                f"{text!r} is no label selector: expected for example ray.io/accelerator-type=L4; other values are "
                "!L4, in(A10G,L4) and !in(A10G,L4), and commas separate several pairs"
            )
        found[pair[1]] = pair[2]
        rest = rest[pair.end() :]
    return found


class RuntimeConfig(Part):
    """Where and how wide it runs. Of this only `precision` enters fingerprints: the rest must not change a result."""

    num_workers: int = Field(1, ge=1)
    """Ray Train workers of a train stage; they share its global batch."""
    min_workers: int = Field(0, ge=0)
    """Least workers of an elastic run, whose worker groups take what room they find, up to `num_workers`: a group that
    loses a node continues with fewer workers, and one that finds more room saves a checkpoint and continues with more.
    Results differ by rounding. For sweeps of one row and one seed. 0: always `num_workers`."""
    use_gpu: bool = False
    """Whether each worker, and each labelling actor, reserves a GPU."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs that each worker reserves."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of training, labelling and evaluation (autocast). auto: bf16 where `use_gpu`, else off. The recipe
    alone decides, because results depend on it: a worker whose device does not have that precision refuses. GPUs before
    NVIDIA's Ampere (T4, V100) have no bfloat16 and need fp16 or off."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass instead of keeping them."""
    validate_on_gpu: bool = True
    """Where validation beside training (`evaluation.every_steps`) runs when `use_gpu`: on a GPU more, or on the CPU."""
    num_labellers: int = Field(0, ge=0)
    """Actors of a separate labelling job, for more (or fewer) devices than train. 0: the workers that train also
    label, which costs no start of actors. Of online labels: the number of teachers, 0: one."""
    cpus_per_labeller: float = Field(0.5, gt=0)
    """CPUs that each actor of a labelling job, and each online teacher, reserves."""
    cpus_per_read: float = Field(0.2, gt=0)
    """CPUs reserved per decoding task. Use 1 on a GPU cluster, where each task keeps a core busy."""
    reads_per_stream: int = Field(2, ge=1)
    """Decoding tasks that one worker's stream runs at a time. One core makes about 50 crops of 512x1024 a second."""
    stream_memory_mb: int = Field(256, ge=16)
    """Object-store memory of one worker's stream: how far it may read ahead of training."""
    max_concurrent_stages: int = Field(0, ge=0)
    """Worker groups and labelling jobs at a time. 0: on one machine as many as its cores hold, on a cluster as many as
    the rows need (at most 32), of which those that find no room wait and make its autoscaler start nodes."""
    worker_selector: str = ""
    """Labels of the nodes that train, validate and, unless there are labellers, label: `key=value`, several with commas
    between. A value is as in Ray's label selectors: `L4`, `!L4`, `in(A10G,L4)` or `!in(A10G,L4)`. Empty: any node."""
    labeller_selector: str = ""
    """The same for the nodes of labellers (`num_labellers`) and of online teachers."""
    max_failures: int = Field(3, ge=0)
    """Times a stage's workers are restarted from the last checkpoint before its row fails."""

    @field_validator("worker_selector", "labeller_selector")
    @classmethod
    def _is_selector(cls, text: str) -> str:
        parse_selector(text)
        return text

    @model_validator(mode="after")
    def _least_workers_are_fewer(self) -> RuntimeConfig:
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"runtime.min_workers is {self.min_workers}: expected at most runtime.num_workers ({self.num_workers})"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the room on the cluster."""
        return 0 < self.min_workers < self.num_workers

    @property
    def least_workers(self) -> int:
        """The fewest workers that a train stage may have."""
        return self.min_workers or self.num_workers

    @property
    def precision(self) -> Precision:
        """What `amp` means for this recipe, on whatever machine it is planned."""
        if self.amp == "auto":
            return "bf16" if self.use_gpu else "off"
        return self.amp
