"""Labels of nodes: what is selected is what Ray selects, and is said in words."""

from __future__ import annotations

import pytest
from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]

from cast_ray.recipe.runtime import parse_selector
from cast_ray.runtime.placement import is_selected, selectors_in_words

NODES: list[dict[str, str]] = [{}, {"gpu": "L4"}, {"gpu": "A10G", "zone": "a"}, {"zone": "b"}]


@pytest.mark.parametrize("text", ["gpu=L4", "gpu=!L4", "gpu=in(L4,A10G)", "gpu=!in(L4,A100)", "gpu=!L4,zone=a", ""])
def test_the_same_nodes_are_selected_as_by_ray(text: str) -> None:
    selector = parse_selector(text)
    assert [is_selected(labels, selector) for labels in NODES] == [
        node_labels_match_selector(labels, selector) for labels in NODES
    ]


def test_selectors_are_said_once() -> None:
    assert selectors_in_words([{"gpu": "L4"}, {"gpu": "L4"}, {}]) == " with gpu=L4"
    assert selectors_in_words([{"gpu": "L4", "zone": "!a"}]) == " with gpu=L4 and zone=!a"
    assert selectors_in_words([{}, {}]) == selectors_in_words([]) == ""
