"""Several machines on this one, for commands that reach others by ssh: `ray up`, and jobs of a scheduler.

A machine is a set of Linux namespaces: it has an address and a host name, sees no processes but its own, and has a
home folder and folders for Ray's temporary files of its own; other folders are shared, as on a network file system.
`ssh` and `rsync` are stand-ins, because nobody can log in here: a program on port 22 of each machine runs the commands
that it is sent. What these start really runs there, and really talks to the other machines over the network.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

NETWORK, OPERATOR = "10.99.0", "operator"
ISOLATED = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
OF_MACHINE = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
SSH_OPTIONS_WITH_VALUE = tuple("bcDEeFIiJLlmOopQRSWw")
OWN_FOLDERS = "CAST_RAY_TEST_OWN_FOLDERS"
"""Variable that names, divided by colons, the folders of which each machine has its own; otherwise it is /tmp/ray."""
END = b"\0ended with "


def in_machines(folder: Path, names: Sequence[str], command: Sequence[str]) -> list[str]:
    """The command line that runs a command on a machine named `operator` beside others with these names.

    Args:
        folder: has `<name>/home` of each machine and `bin` with the stand-ins; a short path, Ray's sockets lie in it.
    """
    return [*ISOLATED, "--net", sys.executable, __file__, "operate", str(folder), ",".join(names), *command]


def operate(folder: Path, names: Sequence[str], command: Sequence[str]) -> int:
    """Starts the machines, and runs the command beside them; returns its exit code. When it ends, they end."""
    _run("ip link set lo up", "ip link add bridge0 type bridge", "ip link set bridge0 up")
    _run(f"ip addr add {NETWORK}.254/24 dev bridge0")
    hosts = [f"127.0.0.1 localhost\n{NETWORK}.254 {OPERATOR}\n"]
    hosts += [f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, 1)]
    (folder / "hosts").write_text("".join(hosts))
    _mount(folder / "hosts", Path("/etc/hosts"))
    for tool in ("ssh", "rsync"):
        path = folder / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {tool} "$@"\n')
        path.chmod(0o755)
    os.environ["PATH"] = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for number, name in enumerate(names, 1):
        # The shell is the machine's first process, which waits for all that lose their parent.
        serve = shlex.join([sys.executable, __file__, "serve", str(folder), name])
        shell = subprocess.Popen([*OF_MACHINE, "bash", "-c", f"{serve}; exit"])
        wait_for(partial(_is_elsewhere, shell.pid))
        _run(
            f"ip link add end{number} type veth peer name eth0 netns {shell.pid}",
            f"ip link set end{number} master bridge0 up",
            *(
                f"nsenter --target {shell.pid} --net ip {change}"
                for change in (f"addr add {NETWORK}.{number}/24 dev eth0", "link set eth0 up", "link set lo up")
            ),
        )
    _enter(folder, OPERATOR)
    for name in names:
        wait_for(partial(_answers, name))
    return subprocess.run(command).returncode


def serve(folder: Path, name: str) -> None:
    """Runs on a machine, as its ssh server would: each connection is a command, whose output is sent back."""
    subprocess.run(["hostname", name], check=True)
    _enter(folder, name)

    class Commands(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if not (line := self.rfile.readline()):
                return
            asked = json.loads(line)
            if isinstance(asked, int):
                with socket.create_connection(("127.0.0.1", asked)) as there:
                    _join(self.connection, there)
                return
            process = subprocess.Popen(
                ["bash", "-c", asked],
                cwd=os.environ["HOME"],
                stdin=subprocess.DEVNULL,
                stdout=self.connection,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            threading.Thread(target=self.end_with_client, args=(process,), daemon=True).start()
            code = process.wait()
            with suppress(OSError):  # the client may have gone; daemons may keep the connection open
                self.connection.sendall(END + str(code).encode())
                self.connection.shutdown(socket.SHUT_RDWR)

        def end_with_client(self, process: subprocess.Popen[bytes]) -> None:
            """Ends a command whose client is gone, as a terminal that is closed does."""
            if not self.rfile.read(1) and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    wait_for(lambda: _has_address(name))
    socketserver.ThreadingTCPServer((socket.gethostbyname(name), 22), Commands).serve_forever()


def ssh(arguments: Sequence[str]) -> int:
    """Stands for `ssh [options] [user@]host command...`, with tunnels (`-L`); returns the command's exit code."""
    left, tunnels = list(arguments), []
    while left and left[0].startswith("-"):
        option = left.pop(0)
        if len(option) == 2 and option[1] in SSH_OPTIONS_WITH_VALUE:
            value = left.pop(0)
            tunnels += [value] if option == "-L" else []
    host = left.pop(0).rpartition("@")[2]
    for tunnel in tunnels:
        ours, _, theirs = tunnel.split(":")
        _tunnel(int(ours), host, int(theirs))
    with socket.create_connection((host, 22)) as connection:
        connection.sendall(json.dumps(" ".join(left)).encode() + b"\n")
        output = b""
        while received := connection.recv(1 << 16):
            output += received
            shown, mark, code = output.rpartition(END)
            if not mark:  # the last bytes may be the beginning of the mark
                shown, output = output[: -len(END)], output[-len(END) :]
                sys.stdout.buffer.write(shown)
                sys.stdout.buffer.flush()
    sys.stdout.buffer.write(shown if mark else output)
    return int(code) if mark else 255


def rsync(arguments: Sequence[str]) -> int:
    """Stands for `rsync --rsh ... [options] source [user@]host:target`; folders are shared, so the host copies."""
    source, target = arguments[-2:]
    host, _, path = target.rpartition(":")
    whole = f"{source}." if source.endswith("/") else source
    return ssh([host, f"mkdir -p $(dirname {path}) && cp -a {shlex.quote(os.path.abspath(whole))} {path}"])


def _tunnel(port: int, host: str, port_there: int) -> None:
    """Connects a port of this machine to one that listens on 127.0.0.1 of another."""

    class Tunnel(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, 22)) as there:
                there.sendall(json.dumps(port_there).encode() + b"\n")
                _join(self.request, there)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", port), Tunnel)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _join(one: socket.socket, other: socket.socket) -> None:
    """Passes on what either side sends, until one of them is closed."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while received := source.recv(1 << 16):
                sink.sendall(received)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=pump, args=(other, one), daemon=True)
    back.start()
    pump(one, other)
    back.join()


def wait_for(condition: Callable[[], bool], patience_s: float = 120) -> None:
    """Polls until `condition` holds. Raises TimeoutError."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a machine does not come up")
        time.sleep(0.05)


def _enter(folder: Path, name: str) -> None:
    """Gives this process and all that it will start the home and the folders of a machine."""
    home = folder / name / "home"
    home.mkdir(parents=True, exist_ok=True)
    for place in map(Path, os.environ.get(OWN_FOLDERS, "/tmp/ray").split(":")):
        own = folder / name / place.name
        for path in (own, place):
            path.mkdir(parents=True, exist_ok=True)
        _mount(own, place)
    os.environ["HOME"] = str(home)
    os.chdir(home)


def _mount(source: Path, place: Path) -> None:
    _run(f"mount --bind {source} {place}")


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


def _is_elsewhere(pid: int) -> bool:
    """Whether a process has a network of its own."""
    return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def _has_address(name: str) -> bool:
    with suppress(OSError), socket.socket() as probe:
        probe.bind((socket.gethostbyname(name), 0))
        return True
    return False


def _answers(name: str) -> bool:
    with suppress(OSError), socket.create_connection((name, 22), timeout=1):
        return True
    return False


def main() -> int:
    role, *arguments = sys.argv[1:]
    if role == "operate":
        return operate(Path(arguments[0]), arguments[1].split(","), arguments[2:])
    if role == "serve":
        serve(Path(arguments[0]), arguments[1])
        return 0
    return {"ssh": ssh, "rsync": rsync}[role](arguments)


if __name__ == "__main__":
    raise SystemExit(main())
