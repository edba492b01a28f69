"""Claims on stages: two holders never both have one, the dead lose theirs, pruning and sweeps see each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import (
    DEAD_AFTER_S,
    Claims,
    Holder,
    Presence,
    Watch,
    dead_claims,
    live_sweeps,
    read_holder,
)

KEYS = ["train-a", "label-b", "train-c"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


def show(store: ArtifactStore, holder: str, beat: int = 1) -> Holder:
    """A holder's file, as if it ran on another machine."""
    shown = replace(Holder.of_this_process("test"), id=holder, host="elsewhere", since=-1e9)
    store.write_json(f"claims/holders/{holder}.json", asdict(shown) | {"beat": beat})
    return shown


def test_who_is_alone_takes_all(store: ArtifactStore) -> None:
    show(store, "a")
    claims = Claims(store, "a")
    assert claims.take(KEYS) == (KEYS, {})
    assert claims.others() == {}  # one's own are not others'


def test_the_second_gets_what_is_before_the_firsts(store: ArtifactStore) -> None:
    for holder in "ab":
        show(store, holder)
    first, second = Claims(store, "a"), Claims(store, "b")
    first.take(KEYS[1:2])
    assert second.take(KEYS) == (KEYS[:1], {KEYS[1]: "a"})  # what follows may read the stage that is not its own
    assert first.others() == {KEYS[0]: "b"}
    first.give_back(KEYS[1:2])
    assert second.take(KEYS[1:]) == (KEYS[1:], {})


def test_two_that_claim_at_once_are_never_both_alone(store: ArtifactStore) -> None:
    """The order of writes and listings is left to the threads; many rounds find many of them."""
    for holder in "abcd":
        show(store, holder)
    everybody = [Claims(store, holder) for holder in "abcd"]
    start = threading.Barrier(len(everybody))

    def take(claims: Claims) -> bool:
        start.wait()
        return bool(claims.take(KEYS[:1])[0])

    winners = []
    with ThreadPoolExecutor(len(everybody)) as pool:
        for _ in range(40):
            winners.append(sum(pool.map(take, everybody)))
            for claims in everybody:
                claims.give_back(KEYS[:1])
    assert max(winners) <= 1
    assert all(claims.others() == {} for claims in everybody)


def test_a_holder_that_falls_silent_is_dead_by_our_own_clock(store: ArtifactStore) -> None:
    clock = Clock()
    watch = Watch(store, clock)
    show(store, "a", beat=1)  # since when it runs, by its own clock, means nothing
    assert watch.is_alive("a")
    clock.now = DEAD_AFTER_S - 1
    assert watch.is_alive("a")
    show(store, "a", beat=2)
    clock.now = DEAD_AFTER_S + 1
    assert watch.is_alive("a")  # it moved
    clock.now += DEAD_AFTER_S
    assert not watch.is_alive("a")
    assert not watch.is_alive("never seen")


def test_claims_of_the_dead_are_free(store: ArtifactStore) -> None:
    show(store, "alive")
    Claims(store, "gone").take(KEYS)  # whose holder's file is not there
    assert Claims(store, "alive").take(KEYS) == (KEYS, {})
    assert store.list_names("claims/stages") == ["alive.json"]


def test_a_claim_is_given_up_and_taken_over(store: ArtifactStore) -> None:
    for holder in "ab":
        show(store, holder)
    first, second = Claims(store, "a"), Claims(store, "b")
    first.take(KEYS)
    first.finished(KEYS[:1])
    assert set(second.others()) == set(KEYS)  # until the file is written again
    first.give_back(KEYS[1:2])
    assert second.others() == {KEYS[2]: "a"}
    again = Claims(store, "a")  # of a broker that took over
    again.recall()
    again.take(["train-d"])
    assert second.others() == {KEYS[2]: "a", "train-d": "a"}


def test_a_process_of_this_machine_that_ended_is_dead_at_once(store: ArtifactStore) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    holder = replace(Holder.of_this_process("test"), id="child", pid=process.pid, pid_started=started)
    store.write_json("claims/holders/child.json", asdict(holder) | {"beat": 1})
    assert Watch(store).is_alive("child") and live_sweeps(store, 60) == {holder: None}
    process.communicate(b"\n")
    assert not Watch(store).is_alive("child") and live_sweeps(store, 60) == {}
    # Its number given to another process is not it; and of another machine nothing is known.
    assert replace(Holder.of_this_process("x"), pid_started="1").is_gone()
    assert not replace(holder, host="elsewhere").is_gone()
    assert not replace(holder, boot_id="of another machine with the same name").is_gone()
    assert not replace(holder, boot_id="").is_gone()  # as earlier versions wrote it
    assert not replace(holder, pid_namespace="pid:[1]").is_gone()


def test_presence_is_shown_and_taken_back(store: ArtifactStore) -> None:
    with Presence(store, "ablate.py losses") as presence:
        presence.need(["f1", "f2", "f1"])
        Claims(store, presence.holder.id).take(KEYS)
        assert Watch(store).is_alive(presence.holder.id)
        assert live_sweeps(store, 60) == {presence.holder: {"f1", "f2"}}
        assert presence.holder.pid == os.getpid() and presence.holder.command == "ablate.py losses"
    assert all(store.list_names(f"claims/{folder}") == [] for folder in ("holders", "plans", "stages"))


def test_a_sweep_waits_for_a_pruning_at_work(store: ArtifactStore) -> None:
    pruning = Presence(store, "store gc", role="gc")
    waited: list[str] = []
    seen: list[set[str] | None] = []

    def end_it(holder: Holder) -> None:
        waited.append(holder.command)
        seen.extend(live_sweeps(store, 60).values())
        pruning.__exit__()

    pruning.__enter__()
    with Presence(store, "ablate.py losses", on_wait=end_it) as presence:
        assert waited == ["store gc"]  # before anything is read
        second = Presence(store, "store gc", role="gc")
        pruning = second.__enter__()
        presence.need(["f"])
    assert waited == ["store gc"] * 2
    assert seen == [None, {"f"}]  # it shows itself before it waits, and says what it needs before it waits again


def test_a_pruning_that_died_is_not_waited_for(store: ArtifactStore) -> None:
    dead = replace(Holder.of_this_process("store gc"), id="dead", pid_started="1")
    store.write_json("claims/pruning/dead.json", asdict(dead) | {"beat": 1})
    with Presence(store, "ablate.py losses", on_wait=lambda holder: pytest.fail("it waited")) as presence:
        presence.need(["f"])


def test_a_wait_that_is_interrupted_takes_the_presence_back(store: ArtifactStore) -> None:
    def interrupt(holder: Holder) -> None:
        raise KeyboardInterrupt

    with Presence(store, "store gc", role="gc"):
        with pytest.raises(KeyboardInterrupt), Presence(store, "ablate.py losses", on_wait=interrupt):
            pass
        assert live_sweeps(store, 60) == {} and store.list_names("claims/holders") == []


def test_a_holder_of_an_earlier_or_later_version_is_read(store: ArtifactStore) -> None:
    described = asdict(show(store, "a"))
    described.pop("boot_id")
    assert read_holder(json.dumps(described | {"beat": 1, "colour": "red"}).encode()).boot_id == ""


def test_files_of_dead_holders_are_told_from_those_of_the_living(store: ArtifactStore) -> None:
    with Presence(store, "ablate.py losses") as presence:
        presence.need(["f"])
        Claims(store, presence.holder.id).take(KEYS)
        with Presence(store, "store gc", role="gc"):
            assert dead_claims(store, 60) == []
        show(store, "silent")
        left = ["claims/holders/silent.json", "claims/plans/silent.json", "claims/stages/silent.json"]
        store.write_json(left[1], {"fingerprints": []})
        store.write_bytes(left[2], b"")
        store.write_bytes("claims/stages/train-y~never-seen", b"")  # as earlier versions wrote them
        assert dead_claims(store, 60) == ["claims/stages/train-y~never-seen"]
        os.utime(Path(store.storage, left[0]), (1, 1))
        assert set(dead_claims(store, 60)) == {*left, "claims/stages/train-y~never-seen"}


def test_a_silent_sweep_of_another_machine_counts_for_a_while(store: ArtifactStore) -> None:
    holder = show(store, "a")
    store.write_json("claims/plans/a.json", {"fingerprints": ["f"]})
    assert live_sweeps(store, silent_s=60) == {holder: {"f"}}
    assert live_sweeps(store, silent_s=-1) == {}
