"""What earlier stages cost: the manifests that estimates are made from, in one small file.

<storage>/past_stages.json    the newest MAX_PAST manifests, without what no estimate reads

A sweep that listed the whole store for them would send a request for every thousand files of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cast_ray.runtime.store.artifacts import ArtifactStore

PATH = "past_stages.json"
MAX_PAST = 400
NOT_READ = ("files", "skipped", "attempt", "owner")


def past_manifests(store: ArtifactStore) -> list[dict[str, Any]]:
    """Manifests of earlier stages, newest first; of a store without the file, by listing it this once."""
    found = store.find_bytes(PATH)
    try:
        if found is not None:
            return json.loads(found)
    except ValueError:  # estimates are made anew
        pass
    newest = sorted(store.list_artifacts().values(), key=lambda a: -(a.committed or 0.0))[:MAX_PAST]
    return list(store.find_manifests(a.key for a in newest if a.committed is not None).values())


def note_past(store: ArtifactStore, keys: Iterable[str]) -> None:
    """Adds the manifests of stages that have run. Of two sweeps that write at once, the later one's are kept."""
    new = store.find_manifests(keys).values()
    if not new:
        return
    by_key = {m["fingerprint"]: m for m in (*past_manifests(store), *new) if "fingerprint" in m}
    newest = sorted(by_key.values(), key=lambda m: -m.get("committed", 0.0))[:MAX_PAST]
    kept = [{name: value for name, value in m.items() if name not in NOT_READ} for m in newest]
    store.write_bytes(PATH, json.dumps(kept).encode())
