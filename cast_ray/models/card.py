"""README.md of a saved model, as model hubs show it: what it is, how good it is, where it comes from, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cast_ray.contracts.row_result import DatasetFacts, RowResult
from cast_ray.recipe import InputSize
from cast_ray.recipe.stages import KINDS_OF_AP

MAX_CLASSES = 20
ROLES = {"refined": "refined student (step 3)", "student": "distilled student (step 2b)", "teacher": "its teacher"}
PRECISIONS = {"off": "float32", "bf16": "bfloat16 (autocast)", "fp16": "float16 (autocast)"}

_USE = """
## Use

```sh
cast-ray predict PHOTOS --student THIS_FOLDER --out OUT
```

```python
import torch
from cast_ray import Student
from cast_ray.data.views import fit_image

student = Student.from_pretrained("THIS_FOLDER")
pixels, inside = fit_image(image, student.input_size)  # image: uint8 [height, width, 3], RGB
(instances,) = student.predict(torch.from_numpy(pixels)[None], [image.shape[:2]], [inside])
```

Each instance has a `label`, a `score` and a mask at the image's own size (`rle`, `size`: COCO run lengths).
"""


def model_card(config: Mapping[str, Any], num_parameters: int, result: RowResult | None) -> str:
    """The card in Markdown, with the hub's YAML header.

    Args:
        config: content of `config.json`.
        num_parameters: number of parameters of the segmenter.
        result: outcome of the row that made the model; None: the card says that there are no measurements.
    """
    model = config["model"]
    names = list(config["id2label"].values())
    more = f" and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    parts = [
        "---\nlibrary_name: cast_ray\npipeline_tag: image-segmentation\ntags: [instance-segmentation]\n---",
        "# Instance segmentation student\n",
        f"- architecture: {model['encoder']['name']} encoder, "
        + (f"{model['decoder']} decoder, " if model["head"] != "eomt" else "")
        + f"{model['head']} head, {model['num_queries']} queries, {num_parameters / 1e6:.1f} M parameters",
        f"- input: RGB, {InputSize.read(config.get('input_size', config))}",
        f"- computes in {PRECISIONS[config['precision']]}",
        f"- {len(names)} classes: {', '.join(names[:MAX_CLASSES])}{more}",
        "- trained by CAST (arXiv 2505.21904) as implemented in cast_ray " + config["cast_ray_version"],
    ]
    parts += _measured(result) if result else ["\nNo measurements were saved with this model."]
    return "\n".join(parts) + "\n" + _USE


def _measured(result: RowResult) -> list[str]:
    metrics, dataset = result.metrics, result.dataset or DatasetFacts()
    lines = ["\n## Measured\n"]
    rows = [(label, role) for role, label in ROLES.items() if metrics.get(f"{role}/mask_ap") is not None]
    if rows:
        lines += ["| model | mask AP | AP50 |", "|---|---:|---:|"]
        for label, role in rows:
            ap, ap50 = (metrics.get(f"{role}/{measure}") for measure in ("mask_ap", "ap50"))
            lines.append(f"| {label} | {_decimal(ap)} | {_decimal(ap50)} |")
        kind = KINDS_OF_AP[result.setting("evaluation.metric") or "coco"]
        images = f"{_known(dataset.num_val)} validation images"
        lines.append(f"\n{kind} in percent on {images}, one run with seed {result.seed}.")
    else:
        lines.append("The run has no evaluation.")
    preset, scale = _known(result.setting("preset")), _known(result.setting("scale"))
    lines += [
        "\n## Made by\n",
        f"- row `{result.row}` of table `{result.table}`, preset {preset} at scale {scale}",
        f"- labelled images: {_known(dataset.num_labelled)}, unlabelled: {_known(dataset.num_unlabelled)}",
    ]
    lines += [f"- `{result.command}`"] if result.command else []
    by_type = {} if result.device_hours is None else result.device_hours_by_type or {"": result.device_hours}
    hours = "".join(f", {hours:.2f} device-hours{f' on {name}' if name else ''}" for name, hours in by_type.items())
    lines.append(f"- code {_known(result.code_version)}{hours}")
    return lines


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _known(value: Any) -> str:
    return "unknown" if value is None else str(value)
