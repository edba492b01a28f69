"""A teacher on its device and the rules that turn its predictions into pseudo-labels; what a labelling process holds.

Apart from `labelling.py` because it imports torch and transformers (about 8 s of CPU time), which row drivers do not.
"""

from __future__ import annotations

import torch
from safetensors.torch import load as load_tensors

from cast_ray.contracts.instance import Instances, RecordLabel
from cast_ray.contracts.soft_targets import with_beliefs
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import LabelPart
from cast_ray.recipe import InputSize, ModelConfig
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_labeller
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.pseudo_labels import pseudo_labels, trusted_instances
from cast_ray.teachers.voting import predict_by_vote


class PseudoLabeller:
    """Labels images as one label stage says, the same whichever images come together.

    Every forward pass has as many images as the stage's config names, all of one size, the last one filled up, and on a
    CPU one thread: an image's labels are then those of the same kernels on the same numbers, whether it is labelled
    offline, online, or by how many processes (tests/ray/test_labels.py). On two CPU models a pass of 1 differed
    from one of 8 by 1e-6, one of 2 threads from one of 1 by 1e-6, and passes of equal shape and threads not at all,
    whatever else they held.
    Kinds of devices still differ.
    """

    def __init__(self, store: ArtifactStore, stage: Stage, device: torch.device):
        self.teacher = load_labeller(store, stage, "teacher", device)
        self.categories = self.teacher.categories
        part = LabelPart.of(stage)
        self.pseudo, self.batch, self.is_soft = part.pseudo, part.batch, part.is_soft

    def load(self, weights: bytes) -> None:
        """Other weights of the same teacher (safetensors): all of those that its training changes."""
        trained = self.teacher.trained
        unknown = trained.load_state_dict(load_tensors(weights), strict=False).unexpected_keys
        assert not unknown, unknown

    def become(self, model: ModelConfig, input_size: InputSize) -> None:
        """Makes a segmenter of this architecture, a student, the one that labels from now on; its weights follow."""
        student = ExpertTeacher(build_segmenter(model, len(self.categories), seed=0), self.categories, input_size)
        student.precision = self.teacher.precision
        self.teacher = student.to(self.teacher.device)

    def label(self, pictures: Pictures) -> list[list[RecordLabel]]:
        """Returns the instances of each image, at its own size, as in LABEL_SCHEMA."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._label(pictures)
        finally:
            torch.set_num_threads(num_threads)

    def _label(self, pictures: Pictures) -> list[list[RecordLabel]]:
        found = predict_in_groups(
            self._full_pass,
            pictures.pixels,
            pictures.image_hw,
            pictures.resized_hw,
            None,
            self.batch,
            min_score=self.pseudo.score_threshold,
        )
        return [self._instances(instances) for instances in found]

    def _full_pass(
        self,
        images: torch.Tensor,
        image_hw: list[tuple[int, int]],
        resized_hw: list[tuple[int, int]],
        max_detections: int | None,
        min_score: float,
    ) -> list[Instances]:
        """The teacher's instances of images of one size, from a pass that is filled up with black ones."""
        filled = images.new_zeros((self.batch, *images.shape[1:]))
        filled[: len(images)] = images
        self.teacher.is_soft = self.is_soft
        return predict_by_vote(self.teacher, filled, image_hw, resized_hw, self.pseudo)

    def _instances(self, found: Instances) -> list[RecordLabel]:
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
