"""What comes back from an annotation tool, whatever tool it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cast_ray.annotation.exported import ExportedImage

MAX_OUTSIDE_PX = 0.5
"""A coordinate may lie this far outside the image by rounding."""


@dataclass(frozen=True)
class ReturnedObject:
    """An object of a returned image: the name of its class, and its mask as COCO compressed counts."""

    class_name: str
    rle: bytes


@dataclass
class ReturnedImage:
    """An image that came back. faults: what of it cannot be used, each a sentence that names the place in the file."""

    image: ExportedImage
    objects: list[ReturnedObject] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Returned:
    """All that came back.

    images: by the name that they were exported under. classes: names, those of the tool's list first. faults: what
    belongs to no exported image. unfinished: names of images that came back without the answer of a person. num_cut:
    objects that reach out of their image, and were cut off at its border.
    """

    images: dict[str, ReturnedImage] = field(default_factory=dict)
    classes: dict[str, None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    num_cut: int = 0

    def add_image(self, image: ExportedImage, place: str) -> ReturnedImage:
        """Notes that an image came back, and returns what its objects are added to."""
        if image.name in self.images:
            self.images[image.name].faults.append(f"{place}: image {image.name!r} is there for the second time")
        return self.images.setdefault(image.name, ReturnedImage(image))

    def add_object(self, to: ReturnedImage, class_name: str, rle: bytes) -> None:
        """Adds an object to its image."""
        self.classes[class_name] = None
        to.objects.append(ReturnedObject(class_name, rle))


@contextmanager
def noted(faults: list[str], place: str) -> Iterator[None]:
    """Adds a ValueError of the block to the faults, with its place."""
    try:
        yield
    except ValueError as error:
        faults.append(f"{place}: {error}")


def check_size(image: ExportedImage, height: object, width: object) -> None:
    """Raises ValueError where a tool's file gives an image another size than it was exported with."""
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"image {image.name!r} is {width} x {height} pixels: expected {image.width} x {image.height}, as exported"
        )


def reaches_outside(polygons: list[list[float]], height: int, width: int) -> bool:
    """Whether a point of some polygons [x0, y0, x1, y1, ...], pixels, lies outside the image."""
    return any(
        min(points) < -MAX_OUTSIDE_PX
        or max(points[::2]) > width + MAX_OUTSIDE_PX
        or max(points[1::2]) > height + MAX_OUTSIDE_PX
        for points in polygons
        if len(points) > 5  # shorter ones are nothing that could be filled
    )
