"""Why two stored stages are not the same one: what their fingerprints cover, compared field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cast_ray.contracts.manifest import Manifest
from cast_ray.plan.settings import flatten

MISSING = "nothing"
INDENT = "  "


def explain_difference(
    one: Manifest,
    other: Manifest,
    find: Callable[[str], Manifest | None],
) -> Iterator[str]:
    """Gives the reasons, one a line: fields of the recipe first, then parents, each with its own reasons indented.

    Args:
        one, other: manifests.
        find: fingerprint of a parent -> its manifest, or None where it is no longer stored.
    """
    if one.fingerprint == other.fingerprint:
        yield "no difference: both are the same stage"
        return
    if one.kind != other.kind:
        yield f"kind: {one.kind}, {other.kind}"
        return
    fields = list(_fields(flatten(one.config), flatten(other.config)))
    yield from fields
    parents = {role: (one.parents.get(role), other.parents.get(role)) for role in one.parents | other.parents}
    differing = {role: pair for role, pair in parents.items() if pair[0] != pair[1]}
    for role, (left, right) in differing.items():
        manifests = [find(fingerprint) if fingerprint else None for fingerprint in (left, right)]
        names = [m.stage if m else f"{f} (not stored)" if f else MISSING for m, f in zip(manifests, (left, right))]
        yield f"parent {role}: {names[0]} {left or ''}, {names[1]} {right or ''}".replace(" ,", ",").rstrip()
        if manifests[0] and manifests[1]:
            yield from (INDENT + line for line in explain_difference(manifests[0], manifests[1], find))
    if not fields and not differing:
        yield "the content of the dataset, or the version of the stage's code: a manifest does not name them"


def _fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(one.keys() | other.keys()):
        values = [part.get(key, MISSING) for part in (one, other)]
        if values[0] != values[1]:
            yield f"{key}: {values[0]}, {values[1]}"
