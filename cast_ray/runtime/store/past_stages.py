"""What earlier stages cost: the manifests that estimates are made from, in one small file.

<storage>/past_stages.json    the newest MAX_PAST manifests, without what no estimate reads

A sweep that listed the whole store for them would send a request for every thousand files of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from cast_ray.contracts.manifest import Manifest, manifest_class
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each

PATH = "past_stages.json"
MAX_PAST = 400
NOT_READ = ("files", "skipped", "attempt", "owner")


def past_manifests(store: ArtifactStore) -> list[Manifest]:
    """Manifests of earlier stages, newest first; of a store without the file, by listing it this once."""
    found = store.find_bytes(PATH)
    try:
        if found is not None:
            return [manifest_class(plain["kind"]).of(plain, store.uri(PATH)) for plain in json.loads(found)]
    except (ValueError, TypeError, KeyError):  # estimates are made anew
        pass
    newest = sorted(store.list_artifacts().values(), key=lambda a: -(a.committed or 0.0))[:MAX_PAST]
    found_manifests = read_each(store.readable_manifest, [a.key for a in newest if a.committed is not None])
    return [manifest for manifest in found_manifests if manifest is not None]


def note_past(store: ArtifactStore, keys: Iterable[str]) -> None:
    """Adds the manifests of stages that have run. Of two sweeps that write at once, the later one's are kept."""
    new = store.find_manifests(keys).values()
    if not new:
        return
    by_fingerprint = {m.fingerprint: m for m in (*past_manifests(store), *new) if m.fingerprint}
    newest = sorted(by_fingerprint.values(), key=lambda m: -(m.committed or 0.0))[:MAX_PAST]
    kept = [{name: value for name, value in m.plain().items() if name not in NOT_READ} for m in newest]
    store.write_bytes(PATH, json.dumps(kept).encode())
