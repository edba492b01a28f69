"""Which sweep runs which stage, agreed through the store: sweeps of several users, machines and Ray clusters share
stages.

    <storage>/claims/holders/<holder>.json          a running sweep, rewritten every BEAT_S
    <storage>/claims/plans/<holder>.json            the fingerprints it needs: what `store gc` must leave alone; while
                                                    a sweep has not written it, that is everything
    <storage>/claims/stages/<holder>.json           "I make these stages": keys of artifacts
    <storage>/claims/pruning/<holder>.json          a `store gc` at work
    <storage>/claims/brokers/...~<holder>           what its broker knows (`sweep/broker_memory.py`)

An object store has no atomic rename and no lock. What it has is enough for mutual exclusion: a file that is written is
in every later listing (S3 since 2020, GCS, a local disk; NFS within its directory cache). To claim a stage, a holder
writes its key into its own file and then reads the other holders' files: if none names the stage, the stage is its
own. Of two holders at least the one that reads later sees both claims, and a holder that sees another's claim takes its
own back and tries again later. So two holders never both believe that they are alone. All claims of a holder are one
file, because an object store charges every request and pyarrow sends three of them to delete a file. Giving up the
claim on a finished stage costs no request: it stays in the file until the file is written again, and another holder
that meets it finds the stage in the store.

Time enters only where a holder dies with its claims. It counts as dead when its file is gone or has not changed for
DEAD_AFTER_S while we watched (by our own clock: clocks need not agree), or at once when it was a process of this
machine that no longer runs. Two machines may have the same host name, and the first process namespace has the same
number on all of them, so a machine is known by its boot id. A holder that was only paused that long may wake up and
finish a stage that another has taken over. Then, as on NFS with a stale cache, a stage is made twice. That costs time
and nothing else: each attempt writes a folder of its own (see `artifacts.py`), and a reader finds whole artifacts only.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cast_ray.runtime.store.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BEAT_S = 10.0
DEAD_AFTER_S = 60.0
PRUNING_POLL_S = 1.0
SEPARATOR = "~"
BROKERS = "claims/brokers"
ROLES = {"sweep": "holders", "gc": "pruning"}
"""What a holder is -> folder of its file."""


@dataclass(frozen=True)
class Holder:
    """A process that makes or prunes stages, as others see it."""

    id: str
    host: str
    pid: int
    pid_namespace: str
    pid_started: str
    user: str
    command: str
    since: float
    boot_id: str = ""
    """Id of the running kernel's start; empty: not known, in files of earlier versions."""

    @classmethod
    def of_this_process(cls, command: str) -> Holder:
        return cls(
            id=uuid.uuid4().hex[:12],
            host=socket.gethostname(),
            pid=os.getpid(),
            pid_namespace=_pid_namespace(),
            pid_started=_start_of(os.getpid()) or "",
            user=_user(),
            command=command,
            since=time.time(),
            boot_id=_boot_id(),
        )

    def is_gone(self) -> bool:
        """Whether it was a process of this machine that has ended; False where this cannot be known."""
        here = (socket.gethostname(), _boot_id(), _pid_namespace())
        if not all(here) or (self.host, self.boot_id, self.pid_namespace) != here:
            return False
        return _start_of(self.pid) != self.pid_started


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Returns when a process of this machine started (ticks since boot); None if there is no such process."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


class Watch:
    """Which holders are alive, judged by what this process has seen of them."""

    def __init__(self, store: ArtifactStore, clock: Callable[[], float] = time.monotonic):
        self.store, self.clock = store, clock
        self.seen: dict[str, tuple[bytes, float]] = {}

    def is_alive(self, holder: str, role: str = "sweep") -> bool:
        asked = self.clock()
        beat = self.store.find_bytes(f"claims/{ROLES[role]}/{holder}.json")
        if self.clock() - asked > BEAT_S:  # the store was out of reach, for those who beat as well
            self.seen.clear()
        if beat is None:
            return False
        before, since = self.seen.get(holder, (None, 0.0))
        if beat != before:
            self.seen[holder] = (beat, self.clock())
            return not read_holder(beat).is_gone()
        return self.clock() - since < DEAD_AFTER_S and not read_holder(beat).is_gone()


def read_holder(beat: bytes) -> Holder:
    """The holder that a file of `claims/holders` or `claims/pruning` describes."""
    known = {field.name for field in fields(Holder)}
    return Holder(**{k: v for k, v in json.loads(beat).items() if k in known})


def find_holder(store: ArtifactStore, holder: str) -> Holder | None:
    """Returns a running sweep by its id; None where its file is gone."""
    beat = store.find_bytes(f"claims/{ROLES['sweep']}/{holder}.json")
    return None if beat is None else read_holder(beat)


class Presence:
    """Shows others that this process is at work; a context manager around a sweep, or around `store gc`.

    A sweep enters its presence before it reads a dataset or anything else of the store. Entering waits for a `store gc`
    at work; one that starts later finds the sweep, and removes no artifact until the sweep has written what it needs.
    So nothing that a sweep reads or writes is pruned under it.

    Args:
        on_wait: called once, with the holder of the `store gc` that is waited for.
    """

    def __init__(
        self,
        store: ArtifactStore,
        command: str,
        role: str = "sweep",
        on_wait: Callable[[Holder], None] = lambda holder: None,
    ):
        self.store, self.role, self.on_wait = store, role, on_wait
        self.holder = Holder.of_this_process(command)
        self.stopped = threading.Event()
        self.beats = 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def path(self) -> str:
        return f"claims/{ROLES[self.role]}/{self.holder.id}.json"

    def __enter__(self) -> Presence:
        self._beat()
        self.thread.start()
        if self.role == "sweep":
            try:
                self._wait_for_pruning()
            except BaseException:  # `__exit__` is not called
                self.__exit__()
                raise
        return self

    def need(self, fingerprints: Iterable[str]) -> None:
        """Declares what this sweep needs; returns when no `store gc` is at work that may not have seen it."""
        plan = {"fingerprints": sorted(set(fingerprints))}
        self.store.write_bytes(f"claims/plans/{self.holder.id}.json", json.dumps(plan).encode())
        self._wait_for_pruning()

    def _wait_for_pruning(self) -> None:
        watch, told = Watch(self.store), False
        while pruning := [h for h in _holders(self.store, "gc") if watch.is_alive(h.id, "gc")]:
            if not told:
                self.on_wait(pruning[0])
                told = True
            self.stopped.wait(PRUNING_POLL_S)

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)
        for name in self.store.list_names(BROKERS):
            if name.endswith(SEPARATOR + self.holder.id):
                self.store.delete_file(f"{BROKERS}/{name}")
        for path in (_claims_path(self.holder.id), f"claims/plans/{self.holder.id}.json", self.path):
            self.store.delete_file(path)

    def _beat(self) -> None:
        self.beats += 1
        self.store.write_json(self.path, asdict(self.holder) | {"beat": self.beats})

    def _run(self) -> None:
        while not self.stopped.wait(BEAT_S):
            try:
                self._beat()
            except OSError:  # the store is out of reach for a moment; dead only after DEAD_AFTER_S
                continue


def _claims_path(holder: str) -> str:
    return f"claims/stages/{holder}.json"


class Claims:
    """One holder's claims on stages, used by its broker."""

    def __init__(self, store: ArtifactStore, holder: str):
        self.store, self.holder = store, holder
        self.watch = Watch(store)
        self.writing = threading.Lock()
        self.held: set[str] = set()
        """Keys that the holder's file must name; it may still name stages that are finished."""

    def recall(self) -> None:
        """Takes over what a broker of this holder that was lost has claimed."""
        with self.writing:
            self.held |= set(self._read(self.holder))

    def take(self, keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Claims stages, in order, up to the first that another holder has.

        Args:
            keys: keys of artifacts; later ones may read earlier ones.

        Returns:
            the keys taken, and what stopped there: {key: holder} of every key that another one claims.
        """
        with self.writing:
            self.held |= set(keys)
            self._write()
        others = self.others()
        taken = []
        for key in keys:
            if key in others:
                break
            taken.append(key)
        if missed := [key for key in keys if key not in taken]:
            self.give_back(missed)
        if taken:
            logger.info("claims taken: %s", ", ".join(taken))
        elsewhere = {key: others[key] for key in keys if key in others}
        if elsewhere:
            logger.info("claimed by other sweeps: %s", ", ".join(f"{key} by {who}" for key, who in elsewhere.items()))
        return taken, elsewhere

    def others(self) -> dict[str, str]:
        """Key -> living holder of every stage that another one claims; claims of the dead are cleared away."""
        found: dict[str, str] = {}
        for name in self.store.list_names("claims/stages"):
            holder = name.removesuffix(".json")
            if holder == self.holder:
                continue
            if self.watch.is_alive(holder):
                found |= dict.fromkeys(self._read(holder), holder)
            else:
                self.store.delete_file(f"claims/stages/{name}")
        return found

    def give_back(self, keys: Iterable[str]) -> None:
        """Gives up stages that are not finished, so that other holders may make them."""
        with self.writing:
            self.held -= set(keys)
            self._write()

    def finished(self, keys: Iterable[str]) -> None:
        """Gives up stages that are committed, without a request: other holders find them in the store."""
        with self.writing:
            self.held -= set(keys)

    def _write(self) -> None:
        self.store.write_json(_claims_path(self.holder), {"keys": sorted(self.held)})

    def _read(self, holder: str) -> list[str]:
        found = self.store.find_bytes(_claims_path(holder))
        return json.loads(found)["keys"] if found else []


def _holders(store: ArtifactStore, role: str) -> list[Holder]:
    names = store.list_names(f"claims/{ROLES[role]}")
    beats = [store.find_bytes(f"claims/{ROLES[role]}/{name}") for name in names if name.endswith(".json")]
    return [read_holder(beat) for beat in beats if beat is not None]


def _living(store: ArtifactStore, role: str, silent_s: float) -> list[Holder]:
    now, found = store.now(), []
    for holder in _holders(store, role):
        written = store.changed(f"claims/{ROLES[role]}/{holder.id}.json")
        if written is not None and not holder.is_gone() and now - written <= silent_s:
            found.append(holder)
    return found


def live_sweeps(store: ArtifactStore, silent_s: float) -> dict[Holder, set[str] | None]:
    """Sweeps that may be at work and the fingerprints they need, for `store gc`; None: a sweep that is still planning.

    A single look cannot tell a dead sweep of another machine from a living one, so every sweep counts whose file was
    written within `silent_s` by the store's own clock; one of this machine that has ended does not.
    """
    found: dict[Holder, set[str] | None] = {}
    for holder in _living(store, "sweep", silent_s):
        plan = store.find_bytes(f"claims/plans/{holder.id}.json")
        found[holder] = set(json.loads(plan)["fingerprints"]) if plan else None
    return found


def dead_claims(store: ArtifactStore, silent_s: float) -> list[str]:
    """Returns the paths of files in `claims/` that belong to sweeps and prunings which are over (see `live_sweeps`)."""
    # Listed before the holders are: a sweep shows its own file first and takes it back last.
    left = {folder: store.list_names(f"claims/{folder}") for folder in ("stages", "plans", "brokers", *ROLES.values())}
    alive = {holder.id for role in ROLES for holder in _living(store, role, silent_s)}
    owners = {
        f"claims/{folder}/{name}": name.rpartition(SEPARATOR)[2].removesuffix(".json")
        for folder, names in left.items()
        for name in names
    }
    return [path for path, owner in owners.items() if owner not in alive]
