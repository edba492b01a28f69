"""From image files to pseudo-labels: a teacher with its settings, and how a teacher is found by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cast_ray.common.paths import is_uri
from cast_ray.common.registry import lookup
from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category
from cast_ray.data.reading.class_lists import check_classes, read_classes
from cast_ray.engine.world import pick_device
from cast_ray.inference.predictor import Chosen, Predictor, mean_score
from cast_ray.models.autocast import fastest_precision
from cast_ray.models.checkpoints import find_checkpoint
from cast_ray.recipe import InputSize, PseudoConfig, Recipe, build_recipe
from cast_ray.recipe.teachers import PUBLISHED
from cast_ray.runtime.store.models import open_teacher
from cast_ray.teachers.class_thresholds import reaching
from cast_ray.teachers.protocol import Teacher
from cast_ray.teachers.pseudo_labels import pseudo_labels
from cast_ray.teachers.voting import predict_by_vote


class Labeller(Predictor):
    """A teacher with its settings: image files in, rows of pseudo-labels out.

    Args:
        teacher: on its device.
        pseudo: which of its instances are trusted, and how they are painted.
        least_scores: class label -> least score of its labels, once they are painted; classes that it leaves out get no
            label; None: those of `pseudo`.
        amp, overlays: see `Predictor`.
    """

    def __init__(
        self,
        teacher: Teacher,
        pseudo: PseudoConfig,
        least_scores: Mapping[int, float] | None = None,
        *,
        amp: str,
        overlays: bool,
    ):
        limit = teacher.config.inference.max_detections
        super().__init__(teacher, threshold=pseudo.score_threshold, max_detections=limit, amp=amp, overlays=overlays)
        self.teacher, self.pseudo, self.least_scores = teacher, pseudo, least_scores

    def ask(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        return predict_by_vote(self.teacher, images, image_hw, resized_hw, self.pseudo)

    def choose(self, instances: Instances) -> Chosen:
        labels = pseudo_labels(instances, self.pseudo)
        score = mean_score(labels)
        if self.least_scores is not None:
            labels = reaching(labels, self.least_scores, "label")
        return Chosen(labels, score)


def make_labeller(
    recipe: Recipe,
    source: str,
    categories: Sequence[Category] | None,
    device: str,
    amp: str,
    overlays: bool,
    least_scores: Mapping[int, float] | None = None,
) -> Labeller:
    """Makes a labeller in whichever process calls it, Ray's workers included; see `load_teacher`."""
    torch.set_num_threads(1)
    teacher = load_teacher(source, categories, recipe).to(pick_device(device))
    if amp == "auto" and source in PUBLISHED:
        amp = fastest_precision(teacher.device)
    return Labeller(teacher, recipe.pseudo, least_scores, amp=amp, overlays=overlays)


def load_teacher(
    source: str | Path, classes: str | Sequence[str | Category] | None = None, recipe: Recipe | None = None
) -> Teacher:
    """Loads a teacher, published or saved, on the CPU and ready to predict.

        teacher = load_teacher("grounded_sam", ["person", "traffic light"])
        teacher = load_teacher("runs/losses-shapes-demo/sup+semi+pxl")

    Args:
        source: a kind of published teacher (`grounded_sam`, `sam3`, ...), or a saved teacher or student: a folder, a
            URI (an artifact of the store is one) or a row `runs/<name>/<row>`.
        classes: what to look for: names, categories, or a text as in `cast-ray label --classes`; None: the classes of
            a saved teacher.
        recipe: its `teacher` part says which checkpoints a published kind has and how any teacher is read out; None:
            the defaults of the preset `coco`.

    Raises:
        ValueError: a checkpoint or teacher that is not there or does not know the classes, or no class at all.
        TypeError: an argument of another type.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source: expected a text or a Path, got {type(source).__name__}")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, as build_recipe makes it, got {type(recipe).__name__}")
    source = str(source)
    if not source.strip():
        raise ValueError(f"source is empty: expected a kind of teacher ({', '.join(PUBLISHED)}) or a saved teacher")
    is_published = source in PUBLISHED
    if recipe is None:
        kind_key = {"teacher.kind": source} if is_published else {}
        recipe = build_recipe("coco", "full", overrides={**kind_key, "stages.use_adapt": False})
    categories = _categories(classes)
    config = recipe.teacher
    if is_published:
        if categories is None:
            raise ValueError(f"teacher {source!r} needs the names of the classes to look for, as ['person', 'car']")
        if config.kind != source:
            raise ValueError(f"teacher.kind of the recipe is {config.kind}: expected {source}")
        folders = {field: find_checkpoint(name, field) for field, name in config.checkpoint_fields().items()}
        kind: type[Teacher] = lookup("teachers", source)
        return kind.load(folders, config, categories, recipe.input_size(by_teacher=True)).eval()
    part: dict[str, Any] = {"inference": config.inference.model_dump()}
    if config.prompt.synonyms:
        part["prompt"] = config.prompt.model_dump()
    size = None if config.image_px is None else InputSize.of(config.image_px)
    try:
        with open_teacher(source, part, size, categories) as teacher:
            return teacher.eval()
    except ValueError as error:
        if is_uri(source) or Path(source).expanduser().exists():
            raise
        kinds = ", ".join(PUBLISHED)
        raise ValueError(f"teacher {source!r}: neither a kind ({kinds}) nor a saved teacher: {error}") from None


def _categories(classes: str | Sequence[str | Category] | None) -> list[Category] | None:
    """Returns the categories that `load_teacher` is asked for; names are numbered from 1."""
    if classes is None or isinstance(classes, str):
        return None if classes is None else read_classes(classes)
    if not isinstance(classes, Sequence) or not all(isinstance(each, str | Category) for each in classes):
        raise TypeError(f"classes: expected a list of names or categories, got {classes!r}")
    categories = [Category(i, c) if isinstance(c, str) else c for i, c in enumerate(classes, 1)]
    check_classes(categories, "classes")
    return categories
