"""Looks at and prunes the artifacts of a storage path: `ablate.py store ls | show | gc`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from cast_ray.console import Parser, plain_console
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each
from cast_ray.runtime.store.pruning import Pruning, find_prunable, prune

NUM_LISTED = 50


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    store = ArtifactStore(arguments.storage or os.environ.get("CAST_RAY_STORAGE") or "storage")
    if not store.list_names(""):
        raise ValueError(f"no store at {store.storage!r}: expected the --storage of earlier runs")
    console = plain_console(160)
    return {"ls": _list, "show": _show, "gc": _collect}[arguments.command](store, arguments, console)


def _list(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Newest artifacts first, then what all of them hold."""
    listed = sorted(store.list_artifacts().values(), key=lambda a: -a.changed)
    if arguments.kind:
        listed = [a for a in listed if a.key.startswith(f"{arguments.kind}-")]
    shown = listed if arguments.all else listed[:NUM_LISTED]
    manifests = read_each(lambda a: store.find_manifest(a.key), shown)
    if arguments.json:
        rows = [
            {"key": a.key, "bytes": a.num_bytes, "committed": a.committed, "stage": (m or {}).get("stage")}
            for a, m in zip(shown, manifests)
        ]
        print(json.dumps(rows))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "artifact", "steps", "seconds", "size", "age"):
        table.add_column(column, justify="left" if column in ("stage", "artifact") else "right", no_wrap=True)
    for artifact, manifest in zip(shown, manifests):
        facts = manifest or {"stage": "unfinished"}
        table.add_row(
            facts["stage"],
            artifact.key,
            f"{facts['steps']:,}" if facts.get("steps") else "",
            f"{facts['stage_seconds']:.0f}" if facts.get("stage_seconds") else "",
            _size(artifact.num_bytes),
            _age(artifact.changed),
        )
    console.print(table)
    more = f", {len(listed) - len(shown):,} more (--all)" if len(shown) < len(listed) else ""
    total = _size(sum(a.num_bytes for a in listed))
    console.print(f"{len(listed):,} artifacts, {total}{more}, in {store.storage}", soft_wrap=True)
    return 0


def _show(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """One artifact: its manifest, its parents, what it leads to."""
    listed = store.list_artifacts()
    found = [a for a in listed.values() if arguments.artifact in (a.key, a.fingerprint)]
    found = found or [a for a in listed.values() if a.fingerprint.startswith(arguments.artifact)]
    if len(found) != 1:
        names = ", ".join(a.key for a in found[:5])
        raise ValueError(f"store show {arguments.artifact!r}: expected one artifact, found {names or 'none'}")
    manifest = store.find_manifest(found[0].key)
    if manifest is None:
        console.print(f"{found[0].key}: unfinished, {_size(found[0].num_bytes)}, last written {_age(found[0].changed)}")
        return 0
    console.print_json(json.dumps(manifest))
    by_fingerprint = {a.fingerprint: a for a in listed.values()}
    for role, fingerprint in manifest["parents"].items():
        state = by_fingerprint[fingerprint].key if fingerprint in by_fingerprint else f"{fingerprint} (pruned)"
        console.print(f"parent  {role}: {state}", highlight=False)
    console.print(f"files   {store.artifact(found[0].key)}, {_size(found[0].num_bytes)}", soft_wrap=True)
    return 0


def _collect(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Prunes, or says what would be pruned."""
    older_s = None if arguments.older_than is None else _seconds(arguments.older_than)
    if arguments.yes:
        pruning = prune(store, older_s, arguments.unused, shlex.join(["ablate.py", "store", *sys.argv[2:]]))
    else:
        pruning = find_prunable(store, older_s, arguments.unused)
    _print_pruning(pruning, console)
    if arguments.yes:
        console.print(f"pruned {_size(pruning.num_bytes)}")
    else:
        console.print(f"would prune {_size(pruning.num_bytes)}: nothing is deleted without --yes")
    return 0


def _print_pruning(pruning: Pruning, console: Console) -> None:
    for what, artifacts in (("unfinished", pruning.unfinished), ("artifacts", pruning.artifacts)):
        console.print(f"{what:12} {len(artifacts):,}, {_size(sum(a.num_bytes for a in artifacts))}")
    console.print(
        f"{'leftovers':12} {len(pruning.leftovers):,} checkpoints, logs, claims and attempts of runs that are over"
    )
    for holder in pruning.planning:
        who = f"a command of {holder.user} on {holder.host} is reading its data and has not said what it needs"
        console.print(f"kept         every artifact: {who}: {holder.command}", highlight=False, soft_wrap=True)
    for holder, count in pruning.in_use.items():
        who = f"a sweep of {holder.user} on {holder.host} may need: {holder.command}"
        console.print(f"kept         {count:,} artifacts that {who}", highlight=False, soft_wrap=True)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _age(written: float) -> str:
    seconds = max(0.0, time.time() - written)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _seconds(text: str) -> float:
    """`30d`, `12h` or `0` in seconds."""
    units: dict[str, Any] = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "d")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"--older-than {text!r}: expected a number of days, or 30d, 12h")
    return seconds


def _parser() -> Parser:
    parser = Parser(prog="ablate.py store", description="Artifacts of stages, across all runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("ls", help="newest artifacts first")
    listing.add_argument("--kind", choices=["train", "label", "evaluate", "dataset"], help="only these")
    listing.add_argument("--all", action="store_true", help=f"all of them (default: {NUM_LISTED})")
    listing.add_argument("--json", action="store_true", help="for programs")
    show = commands.add_parser("show", help="manifest, parents and files of one artifact")
    show.add_argument("artifact", help="its key, its fingerprint or the beginning of that")
    collect = commands.add_parser(
        "gc",
        help="prune; never what a live sweep needs",
        description="Removes what runs that are over have left unfinished: attempts, checkpoints, logs. Finished "
        "artifacts only if asked: --unused, --older-than, or both.",
    )
    collect.add_argument("--unused", action="store_true", help="also artifacts that no result.json in the store names")
    collect.add_argument("--older-than", metavar="AGE", help="also artifacts older than this: 30d, 12h")
    collect.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")
    for command in (listing, show, collect):
        command.add_argument("--storage", help="path or URI; default: $CAST_RAY_STORAGE, else ./storage")
    return parser
