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


def precision_table(result: RowResult) -> Grid:
    """Heading and lines of the thresholds that hold a precision, one line for each class or group of small classes.

    Percent but for counts and thresholds. Promised, right on D_l and its lower bound are known without the truth of
    D_u: the first is what was asked for, the others are estimated on D_l. Measured is the precision of the labels of
    D_u against their hidden truth, empty where nobody knows it.
    """
    head = ["labels of", "classes", "threshold", "promised", "labels of D_l", "right on D_l", "lower bound"]
    head += ["labels of D_u", "measured"]
    body = []
    for stage in result.stages:
        held = stage.held_precision
        if held is None:
            continue
        for group in held.groups:
            audit = result.pseudo_labels.get(stage.name)
            mine = [audit.per_class[name] for name in group.classes if name in audit.per_class] if audit else []
            count = sum(rates.num_labels for rates in mine)
            right = sum(rates.num_labels * (rates.precision or 0.0) for rates in mine)
            threshold = "left unlabelled" if group.threshold is None else f"{group.threshold:.2f}"
            share = None if group.share_right is None else 100 * group.share_right
            line = [stage.name, ", ".join(group.classes), threshold, _number(100 * held.precision)]
            line += [str(group.num_labels), _number(share), _number(100 * group.bound)]
            body.append([*line, str(count) if audit else "", _number(right / count if count else None)])
    return head, body


def _cells(rates: LabelRates) -> list[str]:
    values = (rates.precision, rates.recall, rates.ap, rates.ap50)
    return [str(rates.num_labels), str(rates.num_objects), *map(_number, values)]


def _number(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else ""
