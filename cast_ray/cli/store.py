"""`cast-ray store` looks at, prunes and runs again the artifacts of a storage path.

cast-ray store ls
cast-ray store show train-3f2a
cast-ray store diff train-3f2a train-91c0     # why a row did not reuse a stage
cast-ray store gc --unused --older-than 30d
cast-ray store licences                       # under which licences the stored students may be used
cast-ray store run train-3f2a                 # one stage again, in this process: for a debugger
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from cast_ray.cli.options import Parser, add_storage_option, exit_code, plain_console, positive, storage_path
from cast_ray.cli.store_run import DESCRIPTION, RerunRequest, run_again
from cast_ray.common.text import first_of
from cast_ray.contracts.manifest import Manifest
from cast_ray.plan.graph import Kind
from cast_ray.plan.stage_difference import explain_difference
from cast_ray.runtime.store.artifacts import ArtifactStore, Listed, read_each
from cast_ray.runtime.store.licences import student_licences
from cast_ray.runtime.store.pruning import Pruning, find_prunable, prune
from cast_ray.runtime.sweep.planner import command_line

NUM_LISTED = 50
MAX_ROWS = 6
ARTIFACT_HELP = "its key, its fingerprint or the beginning of one of them"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments, console = _parser().parse_args(argv), plain_console(160)
    if arguments.command == "run":
        return run_again(lambda: _stage_to_run(arguments), console)
    return exit_code(lambda: _on_store(arguments, console))


def _open(arguments: argparse.Namespace) -> ArtifactStore:
    store = ArtifactStore(storage_path(arguments.storage))
    if not store.exists():
        raise ValueError(f"no store at {store.storage!r}: expected the --storage of earlier runs")
    return store


def _on_store(arguments: argparse.Namespace, console: Console) -> int:
    commands = {"ls": _list, "show": _show, "diff": _diff, "gc": _collect, "licences": _licences}
    return commands[arguments.command](_open(arguments), arguments, console)


def _stage_to_run(arguments: argparse.Namespace) -> RerunRequest:
    store = _open(arguments)
    listed = store.list_artifacts()
    key = _named(listed, arguments.artifact, "run").key
    dataset_key = _named(listed, arguments.data, "run --data").key if arguments.data else None
    return RerunRequest(store, key, dataset_key, arguments.steps, arguments.device)


def _list(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Newest artifacts first, then what all of them hold."""
    listed = sorted(store.list_artifacts().values(), key=lambda a: -a.changed)
    if arguments.kind:
        listed = [a for a in listed if a.key.startswith(f"{arguments.kind}-")]
    shown = listed if arguments.all else listed[:NUM_LISTED]
    manifests = read_each(lambda a: store.readable_manifest(a.key), shown)
    if arguments.json:
        rows = [
            {"key": a.key, "bytes": a.num_bytes, "committed": a.committed, "stage": m.stage if m else None}
            for a, m in zip(shown, manifests)
        ]
        print(json.dumps(rows))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "artifact", "steps", "seconds", "size", "age"):
        table.add_column(column, justify="left" if column in ("stage", "artifact") else "right", no_wrap=True)
    for artifact, manifest in zip(shown, manifests):
        table.add_row(
            manifest.stage if manifest else "unfinished" if artifact.committed is None else "unreadable",
            artifact.key,
            f"{manifest.steps:,}" if manifest and manifest.steps else "",
            f"{manifest.stage_seconds:.0f}" if manifest and manifest.stage_seconds else "",
            _size(artifact.num_bytes),
            _age(artifact.changed),
        )
    console.print(table)
    more = f", {len(listed) - len(shown):,} more (--all)" if len(shown) < len(listed) else ""
    total = _size(sum(a.num_bytes for a in listed))
    console.print(f"{len(listed):,} artifacts, {total}{more}, in {store.storage}", soft_wrap=True)
    return 0


def _show(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Shows one artifact: its manifest, its parents and where its files are."""
    listed = store.list_artifacts()
    found = _named(listed, arguments.artifact, "show")
    manifest = store.find_manifest(found.key)
    if manifest is None:
        console.print(f"{found.key}: unfinished, {_size(found.num_bytes)}, last written {_age(found.changed)}")
        return 0
    console.print_json(manifest.to_json())
    by_fingerprint = {a.fingerprint: a for a in listed.values()}
    for role, fingerprint in manifest.parents.items():
        state = by_fingerprint[fingerprint].key if fingerprint in by_fingerprint else f"{fingerprint} (pruned)"
        console.print(f"parent  {role}: {state}", highlight=False)
    console.print(f"files   {store.artifact(found.key)}, {_size(found.num_bytes)}", soft_wrap=True)
    return 0


def _named(listed: Mapping[str, Listed], name: str, command: str) -> Listed:
    """Returns the artifact that a user names by its key, its fingerprint or the beginning of either."""
    found = [a for a in listed.values() if name in (a.key, a.fingerprint)]
    found = found or [a for a in listed.values() if a.fingerprint.startswith(name) or a.key.startswith(name)]
    if len(found) != 1:
        names = ", ".join(a.key for a in found[:5])
        raise ValueError(f"store {command} {name!r}: expected one artifact, found {names or 'none'}")
    return found[0]


def _diff(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Says why two stages have different fingerprints."""
    listed = store.list_artifacts()
    by_fingerprint = {artifact.fingerprint: artifact.key for artifact in listed.values()}
    manifests = []
    for name in (arguments.one, arguments.other):
        key = _named(listed, name, "diff").key
        if (manifest := store.find_manifest(key)) is None:
            raise ValueError(f"store diff {name!r}: {key} is unfinished, so that nothing says what it is of")
        manifests.append(manifest)

    def find(fingerprint: str) -> Manifest | None:
        key = by_fingerprint.get(fingerprint)
        return None if key is None else store.readable_manifest(key)

    console.print(" and ".join(f"{m.stage} {m.fingerprint}" for m in manifests), highlight=False)
    for line in explain_difference(manifests[0], manifests[1], find):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    return 0


def _collect(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Prunes, or says what would be pruned."""
    older_s = None if arguments.older_than is None else _seconds(arguments.older_than)
    if arguments.yes:
        pruning = prune(store, older_s, arguments.unused, command_line())
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


def _licences(store: ArtifactStore, arguments: argparse.Namespace, console: Console) -> int:
    """Says what each student inherits."""
    listed = sorted(store.list_artifacts().values(), key=lambda a: -a.changed)
    students = student_licences(store, [a.key for a in listed if a.committed is not None])
    if arguments.json:
        facts = [
            {"key": s.key, "stage": s.stage, "rows": s.rows, "commercial": s.chain.strictest.commercial}
            | {"sources": s.chain.plain()}
            for s in students
        ]
        print(json.dumps(facts))
        return 0
    for student in students:
        rows = first_of(student.rows, MAX_ROWS) or "no result names it"
        console.print(
            f"{student.key}  {student.stage}, {rows}: {student.chain.verdict}", highlight=False, soft_wrap=True
        )
        for source in student.chain.sources:
            note = f"  {source.note}" if source.note else ""
            console.print(f"  {source.text}{note}", highlight=False, soft_wrap=True)
    console.print(f"{len(students):,} students in {store.storage}", soft_wrap=True, highlight=False)
    return 0


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
    parser = Parser(
        prog="cast-ray store",
        description="Lists, shows, compares and prunes the artifacts of stages, across all runs, and runs one stage "
        "again.",
    )
    commands = parser.add_commands()
    listing = commands.add_parser("ls", help="list artifacts, the newest first")
    listing.add_argument("--kind", choices=get_args(Kind), help="list only artifacts of this kind")
    listing.add_argument("--all", action="store_true", help=f"all of them (default: {NUM_LISTED})")
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")
    show = commands.add_parser("show", help="print manifest, parents and files of one artifact")
    show.add_argument("artifact", help=ARTIFACT_HELP)
    diff = commands.add_parser(
        "diff",
        help="say why two artifacts differ",
        description="Says why two stages have different fingerprints: which fields of the recipe and which parents "
        "differ, and for parents that are stored, why.",
    )
    diff.add_argument("one", help=ARTIFACT_HELP)
    diff.add_argument("other", help=ARTIFACT_HELP)
    collect = commands.add_parser(
        "gc",
        help="remove what is no longer needed, but never what a live sweep needs",
        description="Removes what runs that are over have left unfinished: attempts, checkpoints, logs. Finished "
        "artifacts only if asked: --unused, --older-than, or both.",
    )
    collect.add_argument("--unused", action="store_true", help="also artifacts that no result.json in the store names")
    collect.add_argument("--older-than", metavar="AGE", help="also artifacts older than this: 30d, 12h")
    collect.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")
    licences = commands.add_parser(
        "licences",
        help="say under which licences the students may be used",
        description="Says what each student inherits from its teacher, from the weights it started from and from its "
        "data, as far as results and manifests tell. This is no legal advice.",
    )
    licences.add_argument("--json", action="store_true", help="print JSON, for programs")
    rerun = commands.add_parser(
        "run",
        help="run one stage again in this process, for a debugger",
        description=DESCRIPTION,
    )
    rerun.add_argument("artifact", help=ARTIFACT_HELP)
    rerun.add_argument("--steps", type=positive, metavar="N", help="stop a train stage after N steps (default: all)")
    rerun.add_argument("--device", help="auto, cpu or cuda (default: the kind of device that the stage ran on)")
    rerun.add_argument(
        "--data",
        metavar="DATASET_KEY",
        help="artifact of the dataset to use (default: the one that the stage's fingerprint was made from)",
    )
    for command in (listing, show, diff, collect, licences, rerun):
        add_storage_option(command)
    return parser
