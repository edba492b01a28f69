"""How metrics are called and how their numbers are written: one place, so that all forms of a report agree."""

from __future__ import annotations

from cast_ray.plan.metrics import PER_CLASS
from cast_ray.recipe.stages import KINDS_OF_AP

ROLES = {"zero_shot": "zero-shot", "teacher": "teacher", "student": "student", "refined": "refined", "final": "final"}
"""Models that a row evaluates, as the metrics' first part -> how they are called."""
MEASURES = {
    "mask_ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar": "AR",
    "ar_1": "AR of 1",
    "ar_10": "AR of 10",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
    "margin": "margin",
    "fnr": "FNR",
    "latency_ms": "latency (ms)",
    "params_m": "parameters (M)",
    "gflops": "GFLOPs",
    "fps": "images/s",
}
LOWER_IS_BETTER = ("fnr", "latency_ms", "params_m", "gflops", "loss", "seconds", "device_hours", "memory_mb", "ece")


ON = " on "


def metric_on(metric: str, device: str) -> str:
    """Name of a metric of one type of devices, where it was measured on several: `student/latency_ms on NVIDIA L4`."""
    return f"{metric}{ON}{device}"


def split_metric(metric: str) -> tuple[str, str]:
    """`student/mask_ap` -> (`student`, `mask_ap`); a metric without a role has an empty one."""
    role, slash, measure = metric.partition("/")
    return (role, measure) if slash else ("", role)


def label_of(metric: str) -> str:
    """How a metric is called in a heading: `student AP50`; diagnostics of a stage go without the stage's name."""
    role, measure = split_metric(metric)
    if measure.startswith(f"{PER_CLASS}/"):
        label = f"AP of {measure.removeprefix(f'{PER_CLASS}/')}"
    else:
        measure, on, device = measure.partition(ON)
        label = MEASURES.get(measure, measure.replace("_", " ")) + on + device
    return f"{ROLES[role]} {label}" if role in ROLES else label if measure in MEASURES else metric


def paper_label(metric: str, kind: str) -> str:
    """The heading of published values beside a metric: `paper (Cityscapes AP)`, with the kind of AP where it is one."""
    return f"paper ({KINDS_OF_AP[kind]})" if is_ap(metric) and kind in KINDS_OF_AP else "paper"


def is_ap(metric: str) -> bool:
    """Whether a metric is an average precision or recall, in percent."""
    measure = split_metric(metric)[1]
    return measure in ("mask_ap", "ar") or measure.startswith(("ap", "ar_", PER_CLASS))


def is_lower_better(metric: str) -> bool:
    return split_metric(metric)[1].partition(ON)[0] in LOWER_IS_BETTER


def format_value(metric: str, value: float) -> str:
    """AP with one decimal as in the paper, counts whole, margins with two decimals, others with two or three digits."""
    measure = split_metric(metric)[1]
    if is_ap(metric):
        return f"{value:.1f}"
    if measure.startswith("num_") or abs(value) >= 100:
        return f"{value:,.0f}"
    if measure == "margin":
        return f"{value:.2f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def format_signed(metric: str, value: float) -> str:
    """Formats a value with its sign; a value that is rounded to 0 has none."""
    text = format_value(metric, abs(value))
    return text if not float(text.replace(",", "")) else ("+" if value > 0 else "-") + text


def format_spread(metric: str, mean: float, sd: float | None) -> str:
    """Formats a mean with its standard deviation (`27.0 ±0.3`), or the mean alone if there is no deviation."""
    spread = f" ±{format_value(metric, sd)}" if sd is not None else ""
    return format_value(metric, mean) + spread
