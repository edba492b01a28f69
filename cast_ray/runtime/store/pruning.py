"""Garbage collection of a store, safe beside sweeps that are at work in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cast_ray.contracts.row_result import RowResult
from cast_ray.plan.graph import fingerprint_of
from cast_ray.runtime.store.artifacts import MANIFEST, ArtifactStore, Listed, committed_fingerprints, read_each
from cast_ray.runtime.store.claims import Holder, Presence, dead_claims, live_sweeps
from cast_ray.runtime.store.results import stored_results

SILENT_S = 3600.0
"""A sweep whose sign of life is older than this is over; they come every few seconds, and clocks may differ. Nor is an
unfinished artifact removed before nobody has written to it for so long."""
OF_STAGES = ("labels", "refresh", "validations")
"""Folders below the storage path that hold a folder for each unfinished stage, called by its fingerprint."""


@dataclass(frozen=True)
class Pruning:
    """What can go, and what stays because somebody may need it.

    unfinished: artifacts without a manifest; artifacts: finished ones; leftovers: paths of attempts, checkpoints,
    blocks of labels, claims and logs that nothing leads to any more; in_use: artifacts kept for each live sweep;
    planning: sweeps that have not yet said what they need, so that every artifact stays.
    """

    unfinished: tuple[Listed, ...]
    artifacts: tuple[Listed, ...]
    leftovers: tuple[str, ...]
    in_use: Mapping[Holder, int]
    planning: tuple[Holder, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the artifacts; leftovers are not measured."""
        return sum(a.num_bytes for a in (*self.unfinished, *self.artifacts))


def find_prunable(store: ArtifactStore, older_s: float | None = None, unused: bool = False) -> Pruning:
    """What `prune` would remove now.

    Args:
        older_s: also finished artifacts written longer ago than this.
        unused: also finished artifacts that no result.json of the store names; with `older_s`: only those of them.
    """
    claims = tuple(dead_claims(store, SILENT_S))
    sweeps = live_sweeps(store, SILENT_S)
    planned = {holder: plan for holder, plan in sweeps.items() if plan is not None}
    if planning := tuple(holder for holder in sweeps if holder not in planned):
        return Pruning((), (), claims, {}, planning)
    needed = set().union(*planned.values())
    now = store.now()
    unfinished, finished = [], []
    listed = store.list_artifacts()
    for artifact in listed.values():
        if artifact.fingerprint in needed:
            continue
        if artifact.committed is None:
            if now - artifact.changed > SILENT_S:
                unfinished.append(artifact)
        elif older_s is not None or unused:
            finished.append(artifact)
    if older_s is not None:
        finished = [a for a in finished if now - a.changed > older_s]
    if unused and finished:
        used = _used(store)
        finished = [a for a in finished if a.fingerprint not in used]
    return Pruning(
        tuple(unfinished),
        tuple(finished),
        (*claims, *_leftovers(store, listed, needed, bool(sweeps))),
        {holder: sum(a.fingerprint in plan for a in listed.values()) for holder, plan in planned.items()},
    )


def prune(store: ArtifactStore, older_s: float | None, unused: bool, command: str) -> Pruning:
    """Removes what can go and returns what that was.

    A sweep that starts meanwhile either sees this pruning and waits for its end before it looks what is stored, or is
    seen by it (see `Presence`).
    """
    with Presence(store, command, role="gc"):
        pruning = find_prunable(store, older_s, unused)
        for artifact in (*pruning.unfinished, *pruning.artifacts):
            store.delete_artifact(artifact.key)
        for path in pruning.leftovers:
            store.delete(path)
    return pruning


def _used(store: ArtifactStore) -> set[str]:
    """Fingerprints that some result names, with their ancestors."""
    used: set[str] = set()
    for place, data in stored_results(store):
        try:
            result = RowResult.read(data, place)
        except ValueError as error:
            raise ValueError(
                f"{place}: cannot be read, so that nothing says what it uses: run its sweep again, or remove it: "
                f"{str(error).removeprefix(f'{place}: ')}"
            ) from None
        used |= {stage.fingerprint for stage in result.stages} | set(result.given)
        if result.dataset is not None:
            used.add(fingerprint_of(result.dataset.artifact))
    return used


def _leftovers(store: ArtifactStore, listed: Mapping[str, Listed], needed: set[str], busy: bool) -> list[str]:
    """Checkpoints of finished or forgotten stages and what these stages were in the middle of (blocks of labels,
    versions of a teacher, validation points), attempts beside the one that counts, logs of Tune."""
    committed = committed_fingerprints(listed)
    paths = [f"{folder}/{name}" for folder in OF_STAGES for name in store.list_names(folder) if name not in needed]
    in_progress: set[str] = set()
    for name in store.list_names("checkpoints"):
        fingerprint = name.removesuffix(".json")
        note = store.find_checkpoint(fingerprint)
        if fingerprint in needed and fingerprint not in committed:
            in_progress |= set((note or {}).get("runs", []))
        elif fingerprint in committed or not busy:
            paths.append(f"checkpoints/{name}")
    if busy:  # whose runs these are cannot be told apart
        return paths
    paths += [f"train/{name}" for name in store.list_names("train") if name not in in_progress]
    paths += [f"tune/{name}" for name in store.list_names("tune")]
    keys = [a.key for a in listed.values() if a.committed is not None]
    for key, manifest, names in zip(
        keys, read_each(store.readable_manifest, keys), read_each(lambda k: store.list_names(f"artifacts/{k}"), keys)
    ):
        if manifest and manifest.attempt:
            paths += [f"artifacts/{key}/{name}" for name in names if name not in (MANIFEST, manifest.attempt)]
    return paths
