"""Under which licences the students of a store may be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cast_ray.contracts.manifest import Manifest
from cast_ray.contracts.row_result import RowResult
from cast_ray.plan.reads import STUDENT_STAGES
from cast_ray.recipe import ModelConfig
from cast_ray.recipe.licence_chain import (
    DATA,
    ENCODER,
    TEACHER,
    TEACHERS_ENCODER,
    LicenceChain,
    Source,
    chain_of_plain_recipe,
    checkpoint_source,
    start_sources,
)
from cast_ray.recipe.licences import UNKNOWN
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each
from cast_ray.runtime.store.results import stored_results

NOT_STORED = "its artifact is no longer stored"


@dataclass(frozen=True)
class StudentLicences:
    """A student of a store. rows: `TABLE:ROW` of the results that name it; none where no result does."""

    key: str
    stage: str
    rows: tuple[str, ...]
    chain: LicenceChain


def student_licences(store: ArtifactStore, keys: Iterable[str]) -> list[StudentLicences]:
    """Returns what each student among some artifacts inherits.

    The recipe in a result.json says all of it. Where no result names a student, its manifest and those of its parents
    tell encoder and teacher; the data is then unknown, because a manifest does not name it.
    """
    of_weights = [key for key in keys if key.startswith(("train-", "label-"))]
    manifests = [m for m in read_each(store.readable_manifest, of_weights) if m is not None]
    by_fingerprint = {manifest.fingerprint: manifest for manifest in manifests}
    named = _results_of_stages(store)
    found = []
    for manifest in manifests:
        if manifest.kind != "train" or manifest.stage not in STUDENT_STAGES:
            continue
        results = named.get(manifest.fingerprint, [])
        chains = (chain_of_plain_recipe(result.recipe) for result in results)
        chain = next((chain for chain in chains if chain is not None), None)
        rows = tuple(dict.fromkeys(f"{result.table}:{result.row}" for result in results))
        key = f"{manifest.kind}-{manifest.fingerprint}"
        found.append(StudentLicences(key, manifest.stage, rows, chain or _of_manifests(manifest, by_fingerprint)))
    return found


def _results_of_stages(store: ArtifactStore) -> dict[str, list[RowResult]]:
    """Fingerprint of a stage -> the results that name it; a result that cannot be read names nothing."""
    named: dict[str, list[RowResult]] = {}
    for place, content in stored_results(store):
        try:
            result = RowResult.read(content, place)
        except ValueError:
            continue
        for stage in result.stages:
            named.setdefault(stage.fingerprint, []).append(result)
    return named


def _of_manifests(student: Manifest, stored: Mapping[str, Manifest]) -> LicenceChain:
    teachers: dict[Source, None] = {}
    encoders: dict[Source, None] = {}
    for manifest in _with_init(student, stored):
        if manifest is None:
            encoders[Source(ENCODER, "unknown", UNKNOWN, note=f"What it was refined from: {NOT_STORED}.")] = None
            continue
        encoders |= dict.fromkeys(_start(ENCODER, manifest.config))
        teachers |= dict.fromkeys(_teachers(manifest, stored))
    data = Source(DATA, "unknown", UNKNOWN, note="No result that can be read names this student.")
    return LicenceChain((*teachers, *encoders, data))


def _with_init(manifest: Manifest, stored: Mapping[str, Manifest]) -> Iterator[Manifest | None]:
    """A trained model's manifest and those of what it was trained from; None where one is not stored."""
    while True:
        yield manifest
        if (parent := manifest.parents.get("init")) is None:
            return
        if parent not in stored:
            yield None
            return
        manifest = stored[parent]


def _teachers(student: Manifest, stored: Mapping[str, Manifest]) -> Iterator[Source]:
    """What the teacher of a train stage was made of; nothing where it reads no labels."""
    fingerprint = student.parents.get("teacher")  # of labels that were made as it trained
    if fingerprint is None and (labels := student.parents.get("labels")) is not None:
        if labels not in stored:
            yield _unknown_teacher()
            return
        fingerprint = stored[labels].parents.get("teacher")
    if fingerprint is None:
        return
    if fingerprint not in stored:
        yield _unknown_teacher()
        return
    for manifest in _with_init(stored[fingerprint], stored):
        if manifest is None:
            yield _unknown_teacher()
            continue
        imported = manifest.config.get("imported_from")
        for name in imported.values() if isinstance(imported, Mapping) else [imported] if imported else []:
            yield checkpoint_source(TEACHER, str(name))
        yield from _start(TEACHERS_ENCODER, manifest.config) if not imported else ()


def _unknown_teacher() -> Source:
    return Source(TEACHER, "unknown", UNKNOWN, note=f"Of the teacher: {NOT_STORED}.")


def _start(role: str, config: Mapping[str, Any]) -> list[Source]:
    """The weights that the segmenter of a train stage starts from; none of a teacher from published checkpoints."""
    model = config.get("model", {})
    if not model.get("encoder"):
        return []
    try:
        return start_sources(role, ModelConfig(**model))
    except ValidationError:  # of another version
        return [Source(role, str(model["encoder"].get("name", "unknown")), UNKNOWN)]
