"""Prices of a device-hour: which one a device has."""

from __future__ import annotations

import pytest

from cast_ray.plan.prices import ANY, Prices


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA L4", 0.7),
        ("NVIDIA L40S", 3.0),  # `L4` is no word of it
        ("NVIDIA A100-SXM4-40GB", 2.0),
        ("NVIDIA A100-SXM4-80GB", 4.0),  # the longer name
        ("AMD EPYC, no GPU", 3.0),
        ("NVIDIA A100-SXM4-40GB and NVIDIA L4", None),  # nobody knows the share of each
        ("NVIDIA H100 and NVIDIA L40S", 3.0),
    ],
)
def test_the_longest_name_within_the_devices_counts(device: str, expected: float | None) -> None:
    assert Prices({"l4": 0.7, "A100": 2.0, "A100-SXM4-80GB": 4.0, ANY: 3.0}).of(device) == expected


def test_there_may_be_none() -> None:
    assert not Prices() and Prices().of("NVIDIA L4") is None
    assert Prices({"A10G": 1.0}).of("NVIDIA L4") is None
