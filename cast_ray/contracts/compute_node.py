"""The machine that a stage or a measurement ran on, as manifests and results name it."""

from __future__ import annotations

from collections.abc import Iterable

from cast_ray.contracts.document import DocumentPart


class ComputeNode(DocumentPart):
    """A kind of machine of a cluster; equal for machines that differ in nothing that a reader of a number asks for."""

    node: str | None = None
    """Type of the node where the cluster names it (Ray's label `ray.io/node-group`), otherwise its host name."""
    gpu: str | None = None
    """Model of the GPU that was used; None: none was."""
    gpu_driver: str | None = None
    """Version of the GPU's driver; None: no GPU was used, or it is not known."""
    cpu: str | None = None
    """Model of the CPU."""

    @property
    def device(self) -> str:
        """Model of what computed: of the GPU, or of the CPU where no GPU was used."""
        return self.gpu or f"{self.cpu or 'unknown CPU'}, no GPU"

    @property
    def text(self) -> str:
        """Returns for example `NVIDIA A10G (driver 550.54) on gpu_a10g`, or the CPU where no GPU was used."""
        device = f"{self.device} (driver {self.gpu_driver})" if self.gpu and self.gpu_driver else self.device
        return f"{device} on {self.node}" if self.node else device


UNKNOWN_DEVICE = "unknown device"
TOGETHER = " and "


def device_type(nodes: Iterable[ComputeNode]) -> str:
    """Returns the model of the devices, by which hours and latencies are told apart.

    Hours of unlike devices do not add up, and their latencies do not compare. Several models that computed together are
    a type of their own, such as `NVIDIA A10G and NVIDIA L4`.
    """
    return TOGETHER.join(sorted({node.device for node in nodes})) or UNKNOWN_DEVICE


def nodes_text(nodes: Iterable[ComputeNode]) -> str:
    """The machines in words, each once; empty where there is none."""
    return "; ".join(dict.fromkeys(node.text for node in nodes))
