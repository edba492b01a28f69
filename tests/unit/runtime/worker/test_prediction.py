"""How many workers a prediction may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.worker import prediction


class Reserved(Exception):
    """Resources were asked for."""


@pytest.mark.parametrize(
    ("is_local", "grows", "raised"), [(True, True, ValueError), (False, False, ValueError), (False, True, Reserved)]
)
def test_more_workers_than_fit_are_refused_where_no_node_will_come(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, grows: bool, raised: type[Exception]
) -> None:
    def reserve(bundles: list[dict[str, float]]) -> Any:
        assert bundles[1:] == [{"CPU": 1.0}] * 3
        raise Reserved

    monkeypatch.setattr(prediction, "connect", lambda address: Cluster("", {"CPU": 2.0}, is_local=is_local))
    monkeypatch.setattr(prediction, "has_autoscaler", lambda: grows)
    monkeypatch.setattr(prediction, "reserve", reserve)
    with pytest.raises(raised):
        list(prediction.map_files(lambda: lambda paths: [], ["a"], batch=1, num_workers=3))
