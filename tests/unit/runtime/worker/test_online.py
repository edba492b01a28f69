"""The versions of a refreshed teacher, without Ray: where they are found after a loss, and which are forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.worker import online as online_module
from cast_ray.runtime.worker.online import Publisher, TeacherVersions

# The actor's class without its Ray wrapper: the same methods on an event loop of ours.
make_versions: Any = TeacherVersions.__ray_metadata__.modified_class  # type: ignore[attr-defined]


def test_versions_that_were_lost_are_found_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor that holds them is started again and told of nothing; it once left its stage waiting for ever."""
    monkeypatch.setattr(online_module.ray, "put", lambda weights: weights)
    monkeypatch.setattr(online_module, "STORE_LOOK_S", 0.01)
    store = ArtifactStore(str(tmp_path))
    publisher = publisher_of(store)
    for step in (4, 8):
        publisher.publish(step, f"after {step}".encode())

    async def scene() -> None:
        again = make_versions(store)  # in the place of the one that was told
        assert await again.get(2, "f") == [b"after 8"]
        early = asyncio.ensure_future(again.get(3, "f"))
        await asyncio.sleep(0.05)
        assert not early.done()
        publisher.publish(12, b"after 12")
        assert await early == [b"after 12"]
        await again.start({3: [b"after 12"]})  # the stage resumes: nothing but what it publishes counts
        late = asyncio.ensure_future(again.get(2, "f"))
        await asyncio.sleep(0.05)
        assert not late.done()
        late.cancel()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_stage_that_resumes_forgets_the_versions_of_an_attempt_that_came_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_module.ray, "put", lambda weights: weights)
    monkeypatch.setattr(online_module.ray, "get", lambda answer: answer)
    store = ArtifactStore(str(tmp_path))
    publisher = publisher_of(store)
    for step in (4, 8, 12):
        publisher.publish(step, b"")
    publisher.start(9)  # of windows of 4 steps it needs what was published after steps 4 and 8
    assert sorted(store.list_names(online_module.versions_folder("f"))) == [f"{v:08d}.safetensors" for v in (1, 2)]
    publisher.start(0)
    assert store.list_names(online_module.versions_folder("f")) == []


def publisher_of(store: ArtifactStore) -> Publisher:
    silent = SimpleNamespace(remote=lambda *_: None)
    labels: Any = SimpleNamespace(versions=SimpleNamespace(publish=silent, start=silent), refresh_steps=4)
    return Publisher(store, "f", labels)
