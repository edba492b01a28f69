"""How pseudo-labels reach training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cast_ray.recipe.part import CHANGES_NO_RESULT, Part

FIXED_SIZE_BATCH = 8


class LabelsConfig(Part):
    """How pseudo-labels reach training (1b, 2a); which predictions become labels is the part `pseudo`."""

    mode: Annotated[Literal["offline", "online"], CHANGES_NO_RESULT] = "offline"
    """offline: a labelling stage writes all of them once, for every stage and row that needs them. online: teachers on
    separate devices label each image as it is drawn, while the student trains. A frozen teacher's labels, and so
    all results, are the same either way."""
    refresh_steps: int = Field(0, ge=0)
    """Online labels of a mean teacher: every so many steps the weight average of the model in training (`ema` of its
    stage; 0: its weights as they are) becomes the teacher of later steps. 0: a frozen teacher labels to the end, as in
    the method."""
    refresh_stages: tuple[Literal["selftrain", "distill"], ...] = Field(("selftrain",), min_length=1)
    """Stages whose teacher `refresh_steps` refreshes. selftrain (1c): any kind of teacher that is trained, after
    theta_T'. distill (2b): the student itself labels D_u, after theta_T'' has for the first two times `refresh_steps`
    steps."""
    batch: int | None = Field(None, ge=1)
    """Images of a teacher's forward pass, all of one size. Fewer are filled up: the shape of a pass decides how its
    sums are rounded, so a fixed one makes an image's labels independent of the images beside it. None: 8 where all
    images are fitted into one size; 1 where they keep sizes of their own, so that nothing needs filling up."""
