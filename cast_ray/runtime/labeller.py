"""A teacher on its device and the rules that turn its predictions into pseudo-labels; what a labelling process holds.

Apart from `labelling.py` because it imports torch and transformers (some 8 s of CPU time), which row drivers do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors

from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import ModelConfig, PseudoConfig
from cast_ray.runtime.models import load_labeller
from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.streams import Pictures
from cast_ray.soft_targets import with_beliefs
from cast_ray.stages.graph import Stage
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.pseudo import pseudo_labels, trusted_instances
from cast_ray.teachers.voting import predict_by_vote


class PseudoLabeller:
    """Labels images as one label stage says, the same whichever images come together.

    Every forward pass has the shape that the stage's config names, the last one filled up, and on a CPU one thread: an
    image's labels are then those of the same kernels on the same numbers, whether it is labelled offline, online, or by
    how many processes (tests/integration/test_labels.py). On two CPU models a pass of 1 differed from one of 8 by 1e-6,
    one of 2 threads from one of 1 by 1e-6, and passes of equal shape and threads not at all, whatever else they held.
    Kinds of devices still differ.
    """

    def __init__(self, store: ArtifactStore, stage: Stage, device: torch.device, amp: str):
        self.teacher = load_labeller(store, stage, "teacher", device, amp)
        self.categories = self.teacher.categories
        self.pseudo = PseudoConfig(**stage.config["pseudo"])
        self.batch: int = stage.config["batch"]
        self.is_soft: bool = stage.config.get("soft", False)

    def load(self, weights: bytes) -> None:
        """Other weights of the same teacher (safetensors): all of those that its training changes."""
        trained = self.teacher.trained
        unknown = trained.load_state_dict(load_tensors(weights), strict=False).unexpected_keys
        assert not unknown, unknown

    def become(self, model: ModelConfig, image_px: tuple[int, int]) -> None:
        """From now on a segmenter of this architecture labels, a student; its weights are still to be loaded."""
        segmenter = build_segmenter(model, len(self.categories), seed=0)
        self.teacher = ExpertTeacher(segmenter, self.categories, image_px).to(self.teacher.device)

    def label(self, pictures: Pictures) -> list[list[dict[str, Any]]]:
        """Instances of each image as of LABEL_SCHEMA, at its own size."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._label(pictures)
        finally:
            torch.set_num_threads(num_threads)

    def _label(self, pictures: Pictures) -> list[list[dict[str, Any]]]:
        labels: list[list[dict[str, Any]]] = []
        for start in range(0, len(pictures.positions), self.batch):
            here = slice(start, start + self.batch)
            count = len(pictures.positions[here])
            pixels = np.zeros((self.batch, *pictures.pixels.shape[1:]), dtype=np.uint8)
            pixels[:count] = pictures.pixels[here]
            self.teacher.is_soft = self.is_soft
            sizes = (pictures.image_hw[here], pictures.resized_hw[here])
            found = predict_by_vote(self.teacher, torch.from_numpy(pixels), *sizes, self.pseudo)
            labels += [self._instances(instances) for instances in found]
        return labels

    def _instances(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Balanced thresholds are known once all of D_u is predicted; `LabelJob.join` then paints.
        choose = trusted_instances if self.pseudo.class_thresholds == "balanced" else pseudo_labels
        chosen = choose(found, self.pseudo)
        if self.is_soft:
            chosen = [with_beliefs(instance, len(self.categories)) for instance in chosen]
        return [
            {
                "category_id": self.categories[instance["label"]].id,
                "rle": instance["rle"],
                "score": instance["score"],
                "is_crowd": False,
                "area": None,
                "visible_share": instance.get("visible_share"),
                "num_suppressed": instance["num_suppressed"],
                "class_probs": instance.get("class_probs"),
                "mask_probs": instance.get("mask_probs"),
            }
            for instance in chosen
        ]
