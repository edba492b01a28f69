"""Room on a cluster: reserving what a stage needs, and saying what it waits for.

Facts of Ray 2.60 that shape this file:

- A placement group that no node can hold stays pending, and that is what makes an autoscaler start nodes. Nothing else
  tells it: the resources that are up say nothing of those that may come.
- A group is placed as a whole or not at all, but two groups are not. Ray Train makes the group of its workers itself
  (`ScalingConfig` takes a strategy and label selectors, not a group), and a stage's streams need a group of their own.
  So a stage first has the whole placed in one group, each worker together with its stream, notes the nodes, gives that
  group back, and reserves the parts on just these nodes. Streams can then neither lie on another node than their worker
  nor strand a node's GPU by taking its CPUs.
- A group that an actor has made stays when the actor dies, until the whole job ends. So a reservation carries the name
  of its holder, and whoever learns that the holder is gone gives its reservations back (`give_back`).
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from cast_ray.runtime.ray_internals import autoscaler_complaint

FIRST_LOOK_S, LOOK_S = 2.0, 10.0
ON_DEMAND, ON_DEMAND_SHARE = "on_demand", 0.001
"""Resource of nodes that are not taken back, as in cluster/gpu.yaml, and what each process reserves of it that should
live there: a sweep's broker, with which all its worker groups end, and the rows' drivers."""
NODE_LABEL = "ray.io/node-id"
"""Every node of Ray has this label with its id."""


def on_demand_share(resources: Mapping[str, float]) -> dict[str, float]:
    """What a process reserves that should live on an on-demand node; {} on a cluster that names none.

    Args:
        resources: of the cluster.
    """
    return {ON_DEMAND: ON_DEMAND_SHARE} if resources.get(ON_DEMAND) else {}


def joined(*bundles: Mapping[str, float]) -> dict[str, float]:
    """One bundle with the resources of several, for what must lie on one node."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return dict(total)


def fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    """Whether an empty node holds a bundle."""
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())


def bundles_in_words(bundles: Sequence[Mapping[str, float]]) -> str:
    """For example `2 x {CPU 1, GPU 1} and {CPU 0.4}`."""
    counts = Counter(", ".join(f"{name} {round(n, 2):g}" for name, n in bundle.items()) for bundle in bundles)
    return " and ".join(f"{count} x {{{each}}}" if count > 1 else f"{{{each}}}" for each, count in counts.items())


def selectors_in_words(selectors: Sequence[Mapping[str, str]]) -> str:
    """For example ` with ray.io/accelerator-type=L4`; empty where any node will do."""
    wanted = dict.fromkeys(f"{key}={value}" for each in selectors for key, value in each.items())
    return f" with {' and '.join(wanted)}" if wanted else ""


def is_selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one of those that a label selector of Ray names."""
    for key, value in selector.items():
        wanted = value.removeprefix("!")
        names = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
        if (labels.get(key) in names) == value.startswith("!"):
            return False
    return True


@contextmanager
def reserve(
    bundles: Sequence[Mapping[str, float]],
    *,
    nodes: Sequence[str] | None = None,
    selectors: Sequence[Mapping[str, str]] | None = None,
    say: Callable[[str, str], object] | None = None,
    holder: str = "",
) -> Iterator[PlacementGroup]:
    """Reserves bundles in a placement group, given back at the end.

    Args:
        nodes: id of the node that each bundle must lie on; None: wherever they fit, on as few nodes as possible.
        selectors: in place of nodes, the labels that each bundle's node must have, as label selectors of Ray.
        say: called with what is waited for and with what is known of the reason, from the first seconds on until the
            group is placed. None: the group may still be pending when it is given out.
        holder: in whose name it is reserved, see `give_back`; empty: nobody else's.
    """
    if nodes is not None:
        selectors = [{NODE_LABEL: node} for node in nodes]
    group = ray.util.placement_group(
        [dict(bundle) for bundle in bundles],
        strategy="PACK",
        name=f"{holder}/{uuid.uuid4().hex}" if holder else "",
        bundle_label_selector=[dict(each) for each in selectors] if selectors else None,
    )
    try:
        if say is not None and not group.wait(FIRST_LOOK_S):
            labels = "" if nodes else selectors_in_words(selectors or ())
            words = bundles_in_words(bundles) + (f" on nodes{labels}" if labels else "")
            say(words, "")  # at once: asking for a reason may take seconds
            while not group.wait(LOOK_S):
                say(words, _reason(group))
        yield group
    finally:
        ray.util.remove_placement_group(group)


def give_back(holder: str) -> None:
    """Removes what a process that is gone has reserved: Ray keeps the groups of a dead actor until its job ends."""
    for facts in placement_group_table().values():
        if facts["name"].startswith(f"{holder}/") and facts["state"] != "REMOVED":
            with suppress(ValueError):  # it has just been removed
                ray.util.remove_placement_group(ray.util.get_placement_group(facts["name"]))


def is_broken(group: PlacementGroup) -> bool:
    """Whether a group that was placed has lost a node. Ray then reports it as pending again ("RESCHEDULING")."""
    return placement_group_table(group)["state"] != "CREATED"


def nodes_of(group: PlacementGroup) -> list[str]:
    """Ids of the nodes that hold the bundles of a placed group."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[i] for i in range(len(nodes))]


def _reason(group: PlacementGroup) -> str:
    """Why a group is not placed, as far as Ray says; empty where its resources are merely in use."""
    if placement_group_table(group)["stats"]["scheduling_state"] != "INFEASIBLE":
        return ""
    complaint = autoscaler_complaint()
    return f"the autoscaler says: {complaint}" if complaint else "the nodes that are up cannot hold it"
