"""What a device-hour costs, by the model of the device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cast_ray.contracts.compute_node import TOGETHER

ANY = ""
"""Stands for all models that no other price names."""


@dataclass(frozen=True)
class Prices:
    """Prices of a device-hour. There may be none; such an object is false.

    by_type: a model of devices, or words of its name (`A10G` for `NVIDIA A10G`) -> price; `ANY` -> that of all others.
    """

    by_type: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_type)

    def of(self, device: str) -> float | None:
        """Returns the price of an hour of a device type (`contracts.compute_node.device_type`); None: it is not known.

        The longest name that stands in the device's as whole words counts: `L4` means no `NVIDIA L40S`. Of models that
        computed together the share of each is not known: they have a price only if it is the same for all.
        """
        prices = {self._of_model(model) for model in device.split(TOGETHER)}
        return prices.pop() if len(prices) == 1 else None

    def _of_model(self, model: str) -> float | None:
        named = [name for name in self.by_type if name and _stands_in(name, model)]
        return self.by_type[max(named, key=len)] if named else self.by_type.get(ANY)

    @property
    def text(self) -> str:
        """Returns for example `1.2` or `A10G 1.01, others 0.8`."""
        if set(self.by_type) == {ANY}:
            return f"{self.by_type[ANY]:g}"
        return ", ".join(f"{name or 'others'} {price:g}" for name, price in self.by_type.items())


NO_PRICES = Prices()


def _stands_in(name: str, device: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device, re.IGNORECASE) is not None
