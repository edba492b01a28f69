"""README.md of a saved model, as model hubs show it: what it is, how good it is, where it comes from, how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cast_ray.contracts.row_result import DatasetFacts, RowResult
from cast_ray.recipe import InputSize
from cast_ray.recipe.licence_chain import ENCODER, WHOLE, LicenceChain
from cast_ray.recipe.licences import CHECKPOINTS, DATASETS, OF_FORMAT, UNKNOWN, Licence
from cast_ray.recipe.stages import KINDS_OF_AP

MAX_CLASSES = 20
ROLES = {"refined": "refined student (step 3)", "student": "distilled student (step 2b)", "teacher": "its teacher"}
HERE = "THIS_FOLDER"
"""Stands for the place of the model in the instructions of a card that is only saved."""
TAGS = ["instance-segmentation", "semi-supervised-learning", "knowledge-distillation"]
HUB_DATASETS = ("ade20k", "cityscapes", "coco")
"""Datasets of `recipe.licences.DATASETS` that the hub knows by that name."""
FIRST_FIELDS = ["library_name", "pipeline_tag", "license", "license_name", "license_link", "tags"]
PRECISIONS = {"off": "float32", "bf16": "bfloat16 (autocast)", "fp16": "float16 (autocast)"}

_EXPORTS = "## Exported files\n"
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


def model_card(
    config: Mapping[str, Any],
    num_parameters: int,
    result: RowResult | None,
    licences: LicenceChain | None = None,
    place: str = HERE,
) -> str:
    """The card in Markdown, with the hub's YAML header.

    Args:
        config: content of `config.json`.
        num_parameters: number of parameters of the segmenter.
        result: outcome of the row that made the model; None: the card says that there are no measurements.
        licences: what the model inherits; None: not known.
        place: folder or hub name that the instructions load the model from.
    """
    model = config["model"]
    names = list(config["id2label"].values())
    more = f" and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    header = _metadata(result, licences, place).to_yaml(original_order=FIRST_FIELDS)
    parts = [
        f"---\n{header}\n---",
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
    parts += _licences(licences)
    return "\n".join(parts) + "\n" + _USE.replace(HERE, place)


def with_exports(card: str, exports: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a card with a table of exported files, in place of an earlier one.

    Args:
        card: as `model_card` makes it.
        exports: file name -> its facts, as in `export.json`.
    """
    lines = [
        _EXPORTS,
        "| file | target | precision | MB | AP | difference to PyTorch, 95 % interval | ms | images/s | device |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, facts in sorted(exports.items()):
        row = [f"`{name}`", facts["target"], facts["precision"], f"{facts['bytes'] / 1e6:.1f}"]
        check = facts["check"]
        if check is None:
            row += ["not measured", "", "", "", ""]
        else:
            bounds = check["interval"]
            interval = f" ({bounds[0]:+.2f} to {bounds[1]:+.2f})" if bounds else ""
            row += [f"{check['mask_ap']:.2f}", f"{check['difference']:+.2f}{interval}"]
            row += [
                f"{check['latency_ms']:.1f}",
                f"{check['images_per_s']:.1f}",
                f"{check['device']}, {check['runtime']}",
            ]
        lines.append(f"| {' | '.join(row)} |")
    measured = [facts["check"]["images"] for facts in exports.values() if facts["check"]]
    if measured:
        lines.append(
            f"\nThe files themselves were run on {max(measured)} validation images; PyTorch computed in float32. "
            "Milliseconds are the median of one image, from pixels to masks."
        )
    before, found, after = card.partition(_EXPORTS)
    if found:
        after = after[after.index("\n## ") + 1 :] if "\n## " in after else ""
    else:
        before, use, after = card.partition("## Use\n")
        after = use + after
    return before.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n\n" + after


def _metadata(result: RowResult | None, licences: LicenceChain | None, place: str) -> ModelCardData:
    """The YAML header, in the hub's own form: licence, tags, datasets, metrics and the measured values."""
    dataset = None if result is None else _dataset_of(result)
    measured = [] if result is None else _eval_results(result, dataset)
    starts = [source.name for source in licences.sources if source.role in (ENCODER, WHOLE)] if licences else []
    return ModelCardData(
        library_name="cast_ray",
        pipeline_tag="image-segmentation",
        tags=TAGS,
        datasets=[dataset] if dataset in HUB_DATASETS else None,
        base_model=[name for name in starts if name in CHECKPOINTS] or None,
        metrics=list(dict.fromkeys(each.metric_type for each in measured)) or None,
        eval_results=measured or None,
        model_name=(place.rpartition("/")[2] if place != HERE else "cast_ray student") if measured else None,
        **_licence_fields(licences.strictest if licences else UNKNOWN),
    )


def _licence_fields(licence: Licence) -> dict[str, Any]:
    """`license` and, where the hub has no identifier for it, `license_name` and `license_link`."""
    if licence == UNKNOWN:
        return {"license": "unknown"}
    if licence.id:
        return {"license": licence.id.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.name.lower()).strip("-")
    return {"license": "other", "license_name": name or "other", "license_link": licence.url or None}


def _dataset_of(result: RowResult) -> str | None:
    """The dataset of a result as `DATASETS` names it, where format or `data.licence` tells which it is."""
    said, layout = (result.setting(f"data.{name}") for name in ("licence", "format"))
    return said if said in DATASETS else layout if layout in OF_FORMAT else None


def _eval_results(result: RowResult, dataset: str | None) -> list[EvalResult]:
    """AP and AP50 of the row's last student."""
    role = next((role for role in ROLES if result.metrics.get(f"{role}/mask_ap") is not None), None)
    if role not in ("refined", "student"):
        return []
    kind = KINDS_OF_AP[result.setting("evaluation.metric") or "coco"]
    names = {"mask_ap": f"{kind} of masks", "ap50": f"{kind} of masks at IoU 0.5"}
    of_data = dataset or str(result.setting("data.format") or "custom")
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Instance segmentation",
            dataset_type=of_data,
            dataset_name=DATASETS[dataset].title if dataset else of_data,
            dataset_split="validation",
            metric_type=measure,
            metric_name=name,
            metric_value=round(value, 2),
        )
        for measure, name in names.items()
        if (value := result.metrics.get(f"{role}/{measure}")) is not None
    ]


def _licences(licences: LicenceChain | None) -> list[str]:
    lines = ["\n## Licences\n"]
    if licences is None:
        return [*lines, "Nothing is known of the licences of the weights and the data that this model was made from."]
    lines += ["| inherited from | licence | commercial use | stated by |", "|---|---|---|---|"]
    for source in licences.sources:
        licence = source.licence
        label = f"[{licence.label}]({licence.url})" if "://" in licence.url else licence.label
        words = "with conditions" if licence.commercial == "conditions" else licence.commercial
        stated = source.stated_by + (f" ({source.checked})" if source.checked else "")
        lines.append(f"| {source.role} {source.name} | {label} | {words} | {stated or 'nobody'} |")
    notes = [f"- {source.name}: {source.note}" for source in licences.sources if source.note]
    return [
        *lines,
        *(["", *notes] if notes else []),
        f"\nTaken together: {licences.verdict}. The header names the licence that allows least. Whether the terms of a "
        "teacher or of data bind a model that learnt from them is a question of law; this table is no legal advice.",
    ]


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
