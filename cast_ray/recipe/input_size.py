"""The size at which a model sees a whole image, apart from the crops that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Resize = Literal["fit", "native"] | tuple[int, int]
"""fit: the largest size that fits into a crop; native: the image's own; (S, L): the short side has S pixels, or fewer
where the long side would have more than L. The aspect is always kept."""


@dataclass(frozen=True)
class InputSize:
    """How large an image is when a model sees all of it: for evaluation, prediction and pseudo-labels.

    resize: the rule; crop_px: height and width in pixels that `fit` fits into and pads to, unused by the other rules.
    """

    resize: Resize
    crop_px: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, size: InputSize | tuple[int, int]) -> InputSize:
        """A size as it is; height and width in pixels mean that images are fitted into them."""
        return size if isinstance(size, InputSize) else cls("fit", (size[0], size[1]))

    @property
    def is_fixed(self) -> bool:
        """Whether images of any size come out at one size, so that all of them can pass through a model together."""
        return self.resize == "fit"

    def inside(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in pixels, that an image of this size is resized to."""
        if self.resize == "native":
            return height, width
        if self.resize == "fit":
            scale, limit = min(self.crop_px[0] / height, self.crop_px[1] / width), self.crop_px
        else:
            short, long = self.resize
            scale = min(short / min(height, width), long / max(height, width))
            limit = (long, long)
        return min(limit[0], max(1, round(height * scale))), min(limit[1], max(1, round(width * scale)))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in pixels, of what the model is given: with the padding that `fit` adds below and right."""
        return self.crop_px if self.resize == "fit" else self.inside(height, width)

    def part(self) -> dict[str, Any]:
        """Plain data that `read` reads, as it stands in the config of stages and in the files of saved models."""
        return {"image_px": list(self.crop_px)} if self.resize == "fit" else {"resize": _plain(self.resize)}

    @classmethod
    def read(cls, part: Mapping[str, Any]) -> InputSize:
        """The inverse of `part`; other keys are left alone."""
        resize = part.get("resize", "fit")
        if resize == "fit":
            return cls("fit", (part["image_px"][0], part["image_px"][1]))
        return cls("native" if resize == "native" else (resize[0], resize[1]))

    def __str__(self) -> str:
        if self.resize == "fit":
            return f"fitted into {self.crop_px[0]} x {self.crop_px[1]} px"
        if self.resize == "native":
            return "at the image's own size"
        return f"short side {self.resize[0]} px, long side at most {self.resize[1]} px"


def _plain(resize: Resize) -> str | list[int]:
    return resize if isinstance(resize, str) else list(resize)
