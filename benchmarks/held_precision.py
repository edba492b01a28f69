"""How often a promised precision of pseudo-labels is kept: promised against measured, over the label splits of a run.

    cast-ray ablate precision --preset shapes --seeds $(seq 0 19) --name precision
    python benchmarks/held_precision.py runs/precision

Reads the results of a run whose rows have `pseudo.precision` on data with hidden truth, such as `shapes`. Each seed has
its own D_l, and so its own folds, teachers and thresholds. Of each row and label stage it prints:

- splits; groups: classes, or groups of small classes, that got a threshold, of all that there were;
- kept: share of those groups whose labels of D_u are as precise as promised, against the hidden truth. It should be at
  least 1 - error. D_u is a sample too: a group whose precision is exactly the promised one is counted as kept half of
  the time;
- measured: mean and least precision of a group, and the precision of all labels together (mean over splits);
- labels: of an image of D_u. AP: of the row's student, beside that of rows with fixed thresholds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cast_ray.contracts.label_audit import LabelAudit
from cast_ray.contracts.row_result import RowResult


@dataclass
class Promise:
    """What the splits of one row and label stage show; percent but for counts."""

    promised: float | None = None
    error: float | None = None
    num_groups: int = 0
    measured: list[float] = field(default_factory=list)
    overall: list[float] = field(default_factory=list)
    labels_per_image: list[float] = field(default_factory=list)
    aps: list[float] = field(default_factory=list)

    @property
    def kept(self) -> float | None:
        """Share of the groups with a threshold whose labels are as precise as promised."""
        if self.promised is None or not self.measured:
            return None
        return float(np.mean(np.array(self.measured) >= self.promised))


def group_precision(audit: LabelAudit, classes: Iterable[str]) -> float | None:
    """Measured precision of the labels of some classes, percent; None without a label."""
    rates = [audit.per_class[name] for name in classes]
    count = sum(each.num_labels for each in rates)
    right = sum(each.num_labels * (each.precision or 0.0) for each in rates)
    return right / count if count else None


def read_promises(results: Iterable[RowResult]) -> dict[tuple[str, str], Promise]:
    """(row, label stage) -> what its splits show."""
    found: dict[tuple[str, str], Promise] = defaultdict(Promise)
    for result in results:
        for name, audit in result.pseudo_labels.items():
            promise, stage = found[result.row, name], result.stage(name)
            held = stage.held_precision if stage is not None else None
            if held is not None:
                promise.promised, promise.error = 100 * held.precision, held.error
                promise.num_groups += len(held.groups)
                labelled = [group for group in held.groups if group.threshold is not None]
                shares = (group_precision(audit, group.classes) for group in labelled)
                promise.measured += [share for share in shares if share is not None]
            if audit.precision is not None:
                promise.overall.append(audit.precision)
            promise.labels_per_image.append(audit.coverage.labels_per_image)
            if (ap := result.metrics.get("student/mask_ap")) is not None:
                promise.aps.append(ap)
    return dict(found)


def lines_of(promises: dict[tuple[str, str], Promise]) -> list[str]:
    """The table, a line for each row and label stage."""
    lines = [
        "| row | labels of | promised | splits | groups with a threshold | kept | at least | measured (least) | "
        "all labels | labels an image | student AP |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (row, stage), p in promises.items():
        is_held = p.promised is not None
        measured = f"{np.mean(p.measured):.1f} ({min(p.measured):.1f})" if p.measured else ""
        cells = [row, stage, f"{p.promised:.0f}" if is_held else "", str(len(p.labels_per_image))]
        cells += [f"{len(p.measured)} of {p.num_groups}" if is_held else "", "" if p.kept is None else f"{p.kept:.2f}"]
        cells += ["" if p.error is None else f"{1 - p.error:.2f}", measured]
        cells += [_mean(p.overall), _mean(p.labels_per_image), _mean(p.aps)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, which holds a folder with a result.json for each result")
    files = sorted(parser.parse_args().run.glob("*/result.json"))
    if not files:
        parser.error("no result.json in the folders of this run")
    print("\n".join(lines_of(read_promises(RowResult.read(file.read_bytes(), str(file)) for file in files))))


if __name__ == "__main__":
    main()
