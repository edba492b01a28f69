"""What a plan says about cost: devices of unlike models on lines of their own, each with its price."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE
from cast_ray.plan.cost import PlanCost
from cast_ray.plan.graph import plan, plan_sweep
from cast_ray.plan.prices import ANY, Prices
from cast_ray.recipe import build_recipe
from cast_ray.runtime.sweep.preview import Preview, print_plan


def lines(hours: Mapping[str, float], prices: Prices | None = None) -> list[str]:
    """The lines about devices and cost of a plan that takes so many device-hours on each model of device."""
    row = plan(build_recipe("shapes", "smoke"), "0" * 64, row="sup")
    costs = {model: PlanCost(value, 2 * value, {}, {"measured": 11}) for model, value in hours.items()}
    preview = Preview(plan_sweep([row], []), ["Title"], ["sup"], [], "store", costs=costs, prices=prices, tree=False)
    output = io.StringIO()
    print_plan(preview, Console(file=output, width=200))
    return [
        " ".join(line.split()) for line in output.getvalue().splitlines() if line.startswith(("  devices", "  cost"))
    ]


def test_unlike_devices_have_lines_of_their_own() -> None:
    assert lines({"NVIDIA A100": 2.0, "NVIDIA L4": 8.0}, Prices({"A100": 3.0, "L4": 0.5})) == [
        "devices 2.0 device-hours to run, 4.0 device-hours from scratch, on NVIDIA A100 (stages: 11 measured)",
        "cost 6.00 to run, 12.00 from scratch, at 3 a device-hour",
        "devices 8.0 device-hours to run, 16.0 device-hours from scratch, on NVIDIA L4 (stages: 11 measured)",
        "cost 4.00 to run, 8.00 from scratch, at 0.5 a device-hour",
    ]


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        (None, []),
        (Prices({ANY: 3.0}), ["cost 6.00 to run, 12.00 from scratch, at 3 a device-hour"]),
        (
            Prices({"A100": 3.0, "L4": 0.5}),
            [
                "cost 6.00 to run, 12.00 from scratch, at 3 a device-hour of A100",
                "cost 1.00 to run, 2.00 from scratch, at 0.5 a device-hour of L4",
            ],
        ),
    ],
)
def test_before_anything_has_run_all_prices_are_told(prices: Prices | None, expected: list[str]) -> None:
    first, *rest = lines({UNKNOWN_DEVICE: 2.0}, prices)
    assert first == "devices 2.0 device-hours to run, 4.0 device-hours from scratch (stages: 11 measured)"
    assert rest == expected


def test_a_device_without_a_price_has_no_cost() -> None:
    assert len(lines({"NVIDIA H100": 2.0}, Prices({"A100": 3.0}))) == 1
