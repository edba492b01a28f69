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
    def text(self) -> str:
        """Returns for example `NVIDIA A10G (driver 550.54) on gpu_a10g`, or the CPU where no GPU was used."""
        driver = f" (driver {self.gpu_driver})" if self.gpu_driver else ""
        device = f"{self.gpu}{driver}" if self.gpu else f"{self.cpu or 'unknown CPU'}, no GPU"
        return f"{device} on {self.node}" if self.node else device


def nodes_text(nodes: Iterable[ComputeNode]) -> str:
    """The machines in words, each once; empty where there is none."""
    return "; ".join(dict.fromkeys(node.text for node in nodes))
