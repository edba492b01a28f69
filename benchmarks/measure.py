"""What the benchmarks share: clocks, peak memory, and the line that ends each comparison."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def clock(cpu: bool) -> Callable[[], float]:
    """Seconds of this process on the CPU, for a machine that others use too, or of the wall."""
    return time.process_time if cpu else time.perf_counter


def interleaved(
    variants: Mapping[str, Callable[[], float]], repeats: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of variants that time themselves, in turn, so that a busy machine slows all alike."""
    if warm_up:  # allocator, thread pool
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(run())
    return seconds


def spread(seconds: Sequence[float]) -> str:
    """Median, number and range."""
    median = statistics.median(seconds)
    return f"{median:8.3f} s (n={len(seconds)}, {min(seconds):.3f}-{max(seconds):.3f})"


def memory_growth_mb(run: Callable[[], object]) -> float:
    """How far the resident size peaks above its size before the call, in MB. For a fresh process: memory that the
    allocator kept from earlier work would hide the call's own."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kb("VmRSS")
    run()
    return (_status_kb("VmHWM") - before) / 1024


def peak_tensor_mib(run: Callable[[], object]) -> float:
    """The most memory that torch's allocator of the CPU held at once during a call, beyond what it held before, in MiB.

    It is the sum of all allocations and releases that torch's profiler records, so temporaries inside an operation
    count, and what other libraries allocate does not.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def _status_kb(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def report(name: str, ours: float, theirs: float, unit: str) -> None:
    """The JSON line; ratio: how many times better ours is."""
    ratio = round(theirs / max(ours, 1e-9), 3)
    print(json.dumps({"name": name, "ours": round(ours, 4), "theirs": round(theirs, 4), "ratio": ratio, "unit": unit}))
