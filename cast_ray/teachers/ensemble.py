"""Several teachers as one: their instances fused image by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cast_ray.common import registry
from cast_ray.contracts.instance import Instances, SourcedInstance
from cast_ray.contracts.records import Category
from cast_ray.recipe import InputSize, TeacherConfig
from cast_ray.teachers.fusion import suppress, vote, without_source
from cast_ray.teachers.protocol import Teacher, load_teacher, read_card, save_teacher


class EnsembleTeacher(Teacher):
    """Fuses what its members find by `ensemble.method`; see `fusion`.

    Args:
        members: teachers for the same classes.
        config, categories, input_size: see `Teacher`.
    """

    kind = "ensemble"
    why_not_trained = (
        "set stages.use_adapt=false, or adapt each member in its own run and name the folders of the adapted "
        "teachers in teacher.ensemble.members"
    )

    def __init__(
        self,
        members: Sequence[Teacher],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ):
        super().__init__(config, categories, input_size)
        self.members = nn.ModuleList(members)

    @classmethod
    def parts(cls, config: TeacherConfig) -> dict[str, str]:
        return {f"teacher.ensemble.members[{i}]": f"member-{i}" for i in range(len(config.ensemble.members))}

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> EnsembleTeacher:
        members: list[Teacher] = []
        for i, name in enumerate(config.ensemble.members):
            field = f"teacher.ensemble.members[{i}]"
            if field in folders:  # a saved teacher
                card = read_card(folders[field])
                names, wanted = [c["name"] for c in card["categories"]], [c.name for c in categories]
                if names != wanted:
                    raise ValueError(
                        f"{field}: {str(folders[field])!r} is for the classes {names[:6]}, not {wanted[:6]}"
                    )
                part = {"inference": config.inference.model_dump()} if card["kind"] != "expert" else {}
                members.append(load_teacher(folders[field], part, input_size))
            else:
                kind: type[Teacher] = registry.lookup("teachers", name)
                members.append(kind.load(folders, config.model_copy(update={"kind": name}), categories, input_size))
        return cls(members, config, categories, input_size)

    def save_weights(self, folder: Path) -> None:
        for i, member in enumerate(self.members):
            assert isinstance(member, Teacher)
            save_teacher(member, folder / f"member-{i}")

    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        settings = self.config.ensemble
        # In a vote the unsure count too: they add to the score and the mask of those that they agree with.
        least = 0.0 if settings.method == "vote" else min_score
        members = [member for member in self.members if isinstance(member, Teacher)]
        of_members = [member.find(images, image_hw, resized_hw, max_detections, least) for member in members]
        fused: list[Instances] = []
        of_image: tuple[Instances, ...]
        for of_image in zip(*of_members):
            everything: list[SourcedInstance] = [
                {**instance, "source": source} for source, found in enumerate(of_image) for instance in found
            ]
            if settings.method == "vote":
                kept = vote(everything, settings.iou_threshold, len(self.members))
            else:
                kept = [without_source(instance) for instance in suppress(everything, settings.iou_threshold)]
            fused.append([instance for instance in kept[:max_detections] if not instance["score"] < min_score])
        return fused
