"""Connecting to Ray: an existing cluster where there is one, else a local one sized for this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cast_ray.common.logs import VARIABLE, is_verbose
from cast_ray.common.repeated import repeated
from cast_ray.common.text import first_line
from cast_ray.contracts.row_result import Hardware
from cast_ray.runtime.this_node import cpu_model

# One machine, few stages of a minute each: starting and stopping worker groups is what costs. These settings bring one
# from 17 s to 12 s on two cores; each gives up a feature that matters on a cluster only (docs/operations.md).
LOCAL_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "OMP_NUM_THREADS": "1",
    # Ray runs actors' methods on threads. glibc gives a thread heaps of 64 MB that go back to the kernel when they are
    # empty: half of a labeller's time was page faults (`prepare_process` comes too late for those threads).
    "MALLOC_ARENA_MAX": "1",
    # Ray gives up after 60 s, which a busy machine needs at times.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    # Ray starts some workers ahead and gives them up after 60 s. On a very busy machine a driver was seen to wait for
    # ever after that; the cause was read in the raylet's log and not reproduced.
    "RAY_worker_register_timeout_seconds": "900",
    # Rows, workers and readers are many small processes by design; Ray warns from 4 x this number on.
    "RAY_worker_maximum_startup_concurrency": "8",
}
SLOW_S = 30.0
LOGICAL_CPUS_PER_CORE = 3
LOCALHOST = "127.0.0.1"
ADDRESS_VARIABLE, TEMP_VARIABLE = "RAY_ADDRESS", "RAY_TMPDIR"
PROBE_S = 10.0
"""How long an answer from a cluster's address is waited for."""
HTTP2_SETTINGS = 4
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0])
"""What a client of gRPC says first, and a server answers with a settings frame of its own (RFC 9113, 3.4 and 4.1)."""
SHORT_TEMP_DIR = "/tmp"
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path on Linux."""
SOCKET_PATH = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest that Ray appends to its folder for temporary files."""

# Ray's logs stay in its session folder, Ctrl-C reaches this program, Tune takes reports as they come.
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Trials also report their stages' curves, which do not hold what a search is after.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A lost driver is said in a sentence by the progress display; an error of a row is in its result and error.log.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Cluster:
    """The Ray that a command runs on: what to print about it and what stages may use of it.

    resources: of all nodes together. nodes: of each node, empty, as they are now: of a cluster, others may come and
    these may go. labels: of each of these nodes. is_local: this command started it, on this machine, and nothing else
    uses it.
    """

    description: str
    resources: dict[str, float]
    nodes: tuple[dict[str, float], ...] = ()
    labels: tuple[dict[str, str], ...] = ()
    is_local: bool = True
    log_folder: str = ""
    """Where Ray's processes write their output, on each node; empty: not known."""

    def where_logs_are(self) -> str:
        """Returns a sentence for the user of a row that failed; empty without a known folder."""
        if not self.log_folder:
            return ""
        return f"What Ray's processes wrote is in {self.log_folder} (worker-*.err) of the node where the row ran"


class RaySession:
    """A connection to Ray that several sweeps use one after the other.

    It is made when the first of them needs it, and closed at the end of the `with` block.
    """

    def __init__(self, address: str | None, num_cpus: int | None = None):
        self.address, self.num_cpus = address, num_cpus
        self._cluster: Cluster | None = None

    def connect(self) -> Cluster:
        """Starts or joins Ray unless this session has done so; see `connect`."""
        import ray

        if self._cluster is None or not ray.is_initialized():
            self._cluster = connect(self.address, self.num_cpus)
        return self._cluster

    def __enter__(self) -> RaySession:
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster is not None:
            import ray

            ray.shutdown()


def connect(address: str | None, num_cpus: int | None = None) -> Cluster:
    """Starts or joins Ray.

    A local Ray is given LOGICAL_CPUS_PER_CORE logical CPUs a core: short tasks of Ray's own ask for a whole CPU and
    would wait behind the workers. Stages still count cores.

    Args:
        address: "local" for a Ray of this command alone; None: the cluster of RAY_ADDRESS (set in jobs), else local.
        num_cpus: cores that a local Ray may use; None: the machine's.

    Raises:
        ValueError: no Ray answers at the address, or a local one does not start; one line that says what to do.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from_variable = os.environ.get(ADDRESS_VARIABLE)  # Ray reads it for "auto", too
    wanted = from_variable or address or "local" if address in (None, "auto") else address
    said_by = ADDRESS_VARIABLE if wanted == from_variable else "--address"
    local = wanted == "local"
    if local:
        for name, value in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)
        _choose_temp_dir()
    else:
        _check_address(wanted, said_by)
    import ray

    from cast_ray.runtime.ray_internals import hide_pushed_errors

    if not is_verbose():
        hide_pushed_errors()
    # What goes wrong in starting or joining is said in one line below.
    options: dict[str, Any] = {
        "log_to_driver": is_verbose(),
        "logging_level": logging.CRITICAL,
        "namespace": "cast_ray",
    }
    if is_verbose() and not local:  # a local Ray inherits the variable
        options["runtime_env"] = {"env_vars": {VARIABLE: "1"}}
    cores = num_cpus or os.cpu_count() or 1
    if local:
        port = _free_port()
        # Ray's own processes look for "the" cluster of this machine when they ask for an actor's state. That may be
        # another one, or one that `ray start` noted and that is gone: then every worker group ends 12 s late
        # (train/v2 PlacementGroupCleaner), or is taken for dead.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOCALHOST}:{port}"
        options |= {"num_cpus": LOGICAL_CPUS_PER_CORE * cores, "include_dashboard": True}
        options |= {"dashboard_host": LOCALHOST, "dashboard_port": port}
    try:
        with _told_when_slow("Ray is starting" if local else f"joining the Ray at {wanted}"):
            context = ray.init(wanted, **options)
    except Exception as error:  # Ray raises anything, from OSError to Exception itself
        ray.shutdown()
        reason = first_line(error)
        if local:
            raise ValueError(
                f"a local Ray did not start: {reason}. The load of this machine is {os.getloadavg()[0]:.1f} on "
                f"{os.cpu_count()} cores: try again when it is less busy, or name a running cluster by --address or "
                f"{ADDRESS_VARIABLE}; Ray's files are in {_temp_dir()}/ray ({TEMP_VARIABLE})"
            ) from error
        raise ValueError(
            f"{said_by} {wanted}: what answers there cannot be joined: {reason} (Ray {ray.__version__} here). "
            f"{_how_to_go_on(said_by)}"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    resources = ray.cluster_resources() | ({"CPU": float(cores)} if local else {})
    dashboard = f", dashboard http://{context.dashboard_url}" if context.dashboard_url else ""
    size = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    where = "started here" if local else "cluster"
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(
        f"Ray {ray.__version__} {where}: {size}{dashboard}",
        resources,
        nodes=tuple(node["Resources"] for node in alive),
        labels=tuple(node["Labels"] for node in alive),
        is_local=local,
        log_folder=_log_folder(context),
    )


@contextmanager
def _told_when_slow(what: str) -> Iterator[None]:
    """Says on stderr every SLOW_S seconds that something still goes on, with the machine's load."""
    began = time.monotonic()

    def tell() -> bool:
        load = f"the load of this machine is {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"{what} for {time.monotonic() - began:.0f} s: {load}", file=sys.stderr, flush=True)
        return False

    with repeated(tell, SLOW_S):
        yield


def _log_folder(context: Any) -> str:
    """Returns the folder of the session's logs; a Ray Client's context does not know it."""
    session = (getattr(context, "address_info", None) or {}).get("session_dir")
    return f"{session}/logs" if session else ""


def _check_address(address: str, said_by: str) -> None:
    """Asks whether a gRPC server, as Ray's are, answers at a cluster's address: Ray itself would wait for minutes.

    Raises:
        ValueError: none does, or this is no address; names the variable or flag that said it.
    """
    if address == "auto":
        return
    scheme, _, place = address.rpartition("://")
    host, _, port = place.partition("/")[0].rpartition(":")
    if not (host and port.isdigit()):
        if scheme:
            return  # of a kind that Ray or a plug-in of it may know
        raise ValueError(f"{said_by} {address}: expected HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("0", "false"):
                connection.sendall(HTTP2_HELLO)
                frame = connection.recv(9)
                if len(frame) < 4 or frame[3] != HTTP2_SETTINGS:
                    raise ConnectionError("another kind of server listens")
    except (OSError, OverflowError) as error:
        raise ValueError(f"{said_by} {address}: no Ray answers there ({error}). {_how_to_go_on(said_by)}") from None


def _how_to_go_on(said_by: str) -> str:
    if said_by == ADDRESS_VARIABLE:
        return f"Unset {ADDRESS_VARIABLE} or pass --address local for a Ray of this command's own"
    return "Pass --address local for a Ray of this command's own"


def _temp_dir() -> str:
    """Where a local Ray puts its files, in a folder `ray`."""
    return os.environ.get(TEMP_VARIABLE) or os.environ.get("TMPDIR") or SHORT_TEMP_DIR


def _choose_temp_dir() -> None:
    """Keeps the paths of a local Ray's sockets within what the system allows.

    Raises:
        ValueError: the folder is too long and there is none to take in its place.
    """
    longest = MAX_SOCKET_PATH - len(SOCKET_PATH)
    if len(os.fsencode(os.path.abspath(_temp_dir()))) <= longest:
        return
    if os.environ.get(TEMP_VARIABLE) or not os.access(SHORT_TEMP_DIR, os.W_OK):
        name = TEMP_VARIABLE if os.environ.get(TEMP_VARIABLE) else "TMPDIR"
        raise ValueError(
            f"{name} {_temp_dir()}: a local Ray's sockets need a folder of at most {longest} characters: set "
            f"{TEMP_VARIABLE} to a short one"
        )
    os.environ[TEMP_VARIABLE] = SHORT_TEMP_DIR
    # The processes of Ray's dashboard make sockets in TMPDIR, whatever Ray's own folder is, and do not start without.
    tempfile.gettempdir()  # noted before: this process keeps the user's folder for its own files
    os.environ["TMPDIR"] = SHORT_TEMP_DIR


def _free_port() -> int:
    """One that nobody listens on; not Ray's 8265, which two commands that start together would both find free."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def hardware() -> Hardware:
    """This machine, for the result: CPU model, cores and memory of where the sweep is planned."""
    try:
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory_gb = 0.0
    return Hardware(cpu=cpu_model(), num_cpus=os.cpu_count() or 1, memory_gb=round(memory_gb, 1))
