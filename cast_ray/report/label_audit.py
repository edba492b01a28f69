"""Tables of the audit of pseudo-labels."""

from __future__ import annotations

from cast_ray.contracts.label_audit import LabelRates
from cast_ray.contracts.row_result import RowResult

WORST_SHEET = "pseudo_labels_worst.png"
"""Where a run folder keeps the page of worst cases."""
Grid = tuple[list[str], list[list[str]]]


def audit_table(result: RowResult) -> Grid:
    """Heading and lines of a result's audits: each labelling stage as a whole, by size and by class.

    Percent but for counts and ECE; `errors` are wrong labels: duplicate, other class, poor mask, background.
    """
    head = ["labels of", "group", "labels", "objects", "precision", "recall", "AP", "AP50", "ECE", "errors"]
    body = []
    for stage, audit in result.pseudo_labels.items():
        ece = audit.calibration.ece
        errors = " / ".join(str(n) for n in audit.errors.values())
        body.append([stage, "all", *_cells(audit), f"{ece:.2f}" if ece is not None else "", errors])
        body += [[stage, size, *_cells(a), "", ""] for size, a in audit.by_size.items() if a.num_objects]
        for name, numbers in audit.per_class.items():
            errors = " / ".join(str(n) for n in audit.errors_per_class.get(name, {}).values())
            body.append([stage, name, *_cells(numbers), "", errors])
    return head, body


def coverage_table(result: RowResult) -> Grid:
    """Heading and lines of what the labels cover, one line a labelling stage; percent but for counts.

    Left-overs are labels that keep less than half of their mask after painting; suppressed are predictions that a
    better one of their class removed before it.
    """
    head = ["labels of", "images", "without label", "labels per image", "objects found", "object pixels labelled"]
    head += ["labelled pixels right", "left-overs", "precision of left-overs", "of the others", "suppressed"]
    body = []
    for stage, audit in result.pseudo_labels.items():
        coverage = audit.coverage
        shares = (coverage.objects.mean, coverage.pixels.mean, coverage.pixel_precision)
        counts = [str(audit.num_images), str(coverage.images_without_label)]
        line = [stage, *counts, f"{coverage.labels_per_image:.1f}", *map(_number, shares)]
        if audit.visibility is not None:
            left_overs, others = audit.visibility.left_overs, audit.visibility.others
            line += [str(left_overs.num_labels), _number(left_overs.precision), _number(others.precision)]
        suppressed = "" if audit.num_suppressed is None else str(audit.num_suppressed)
        body.append([*line, *[""] * (len(head) - 1 - len(line)), suppressed])
    return head, body


def _cells(rates: LabelRates) -> list[str]:
    values = (rates.precision, rates.recall, rates.ap, rates.ap50)
    return [str(rates.num_labels), str(rates.num_objects), *map(_number, values)]


def _number(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else ""
