"""Trained models as artifacts: `model.safetensors` and `model.json` (architecture, classes, input size)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.recipe import ModelConfig
from cast_ray.records import Category
from cast_ray.runtime.store import ArtifactStore, open_uri
from cast_ray.stages.graph import Stage

WEIGHTS, CARD = "model.safetensors", "model.json"


def save_model(store: ArtifactStore, stage: Stage, segmenter: Segmenter, categories: tuple[Category, ...]) -> None:
    """Adds a model's two files to an artifact that is not yet committed."""
    card = {
        "model": segmenter.config.model_dump(),
        "categories": [{"id": c.id, "name": c.name} for c in categories],
        "image_px": list(stage.config["data"]["image_px"]),
    }
    store.add(stage, CARD, json.dumps(card, indent=1).encode())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
    store.add(stage, WEIGHTS, save_tensors(tensors))


def load_model(store: ArtifactStore, key: str) -> tuple[Segmenter, tuple[Category, ...]]:
    """A trained model and its classes, on the CPU."""
    card = store.read_json(key, CARD)
    categories = tuple(Category(**c) for c in card["categories"])
    segmenter = build_segmenter(ModelConfig(**card["model"]), len(categories), seed=0)
    try:
        segmenter.load_state_dict(load_tensors(store.read_bytes(key, WEIGHTS)))
    except RuntimeError as error:
        raise ValueError(
            f"{store.artifact(key)}: the stored weights do not fit this version's model: {error}"
        ) from None
    return segmenter, categories


def import_foundation(
    store: ArtifactStore, folder: str, expected: ModelConfig, categories: tuple[Category, ...]
) -> str:
    """Brings a saved teacher into the store as theta_T0 and returns its fingerprint (a hash of its weights).

    Raises:
        ValueError: no such model, another architecture than `teacher`, or another class list than the dataset's.
    """
    fs, path = open_uri(folder)
    try:
        with fs.open_input_file(f"{path}/{CARD}") as file:
            card = json.loads(file.read())
        with fs.open_input_file(f"{path}/{WEIGHTS}") as file:
            weights = file.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"stages.foundation: no saved model in {folder!r}: {error}") from None
    names, wanted = [c["name"] for c in card["categories"]], [c.name for c in categories]
    if [(c["id"], c["name"]) for c in card["categories"]] != [(c.id, c.name) for c in categories]:
        raise ValueError(
            f"stages.foundation: {folder!r} was trained on {_short(names)}, the dataset has {_short(wanted)}"
        )
    if ModelConfig(**card["model"]) != expected:
        raise ValueError(f"stages.foundation: the model in {folder!r} is not the recipe's `teacher`: {card['model']}")
    fingerprint = hashlib.sha256(weights).hexdigest()[:20]
    stage = Stage("foundation", "train", {"imported_from": folder}, {}, fingerprint)
    if not store.has(stage.key):
        store.add(stage, CARD, json.dumps(card).encode())
        store.add(stage, WEIGHTS, weights)
        store.commit(stage, {"seconds": 0.0})
    return fingerprint


def _short(names: list[Any]) -> str:
    return ", ".join(map(str, names[:6])) + (f", ... ({len(names)})" if len(names) > 6 else "")
