"""J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl of one step, as sums and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cast_ray.common.registry import import_named
from cast_ray.contracts.records import Batch, Targets
from cast_ray.losses.contrastive.loss import contrastive_loss, temperature_at
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.contrastive.pixels import diagnose
from cast_ray.losses.joint_step import Gather, JointStep
from cast_ray.losses.set.criterion import set_loss, target_weights
from cast_ray.losses.set.proposals import proposal_loss, proposal_weights
from cast_ray.models.cast_network import Output
from cast_ray.recipe import ContrastiveConfig, LossConfig

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Criterion(Protocol):
    """The supervised terms of a network that is not a segmenter, by exact name."""

    weights: dict[str, float]

    def __call__(self, output: Output, targets: Sequence[Targets]) -> Terms:
        """Per term (sum [B], count [B]), one entry per image."""
        ...


class Objective:
    """The loss of every stage. `weights` holds the weight of each term by exact name, `weights_at` those at a time.

    Terms: `sup/<term>` on D_l, `semi/<term>` on pseudo-labels (both the set loss and, for models with proposals, their
    auxiliary loss, or the terms of `criterion`), `pxl` on all images of the step, `extra` by `loss.extra_term`.

    Args:
        loss: weights of the terms.
        contrastive: None: no L_pxl.
        gather: joins tensors of all workers: the candidates of L_pxl, and what decides on the random draws.
        criterion: of a network that is not a segmenter.
        proposals: whether the segmenter has dense proposals.
    """

    def __init__(
        self,
        loss: LossConfig,
        contrastive: ContrastiveConfig | None,
        gather: Gather | None = None,
        criterion: Criterion | None = None,
        proposals: bool = True,
    ):
        self.loss, self.contrastive, self.gather, self.proposals = loss, contrastive, gather, proposals
        self.criterion = criterion
        own = {"class": loss.class_weight, "mask": loss.mask_weight, "dice": loss.dice_weight}
        if criterion is not None:
            own = criterion.weights
        elif proposals:
            own |= proposal_weights(loss)
        self.weights = {f"sup/{name}": weight for name, weight in own.items()}
        if loss.lambda_semi > 0:
            self.weights |= {f"semi/{name}": loss.lambda_semi * weight for name, weight in own.items()}
        self.extra = import_named(loss.extra_term) if loss.extra_term else None
        if self.extra is not None:
            self.weights["extra"] = loss.extra_weight
        if contrastive is not None:
            self.weights["pxl"] = loss.lambda_pxl

    @property
    def is_semi_strong(self) -> bool:
        """Whether L_semi reads the strong view of D_u."""
        return self.loss.lambda_semi > 0 and self.loss.semi_view == "strong"

    @property
    def reads_strong(self) -> bool:
        """Whether any term reads a strong view."""
        return self.contrastive is not None or self.is_semi_strong

    def weights_at(self, progress: float) -> dict[str, float]:
        """The weights after a share of the steps: L_semi has none before `loss.burn_in_fraction`."""
        if progress >= self.loss.burn_in_fraction:
            return self.weights
        return {name: 0.0 if name.startswith("semi/") else weight for name, weight in self.weights.items()}

    def __call__(
        self, output: Output, batch: Batch, step: int, generator: torch.Generator, diagnose: bool = False
    ) -> tuple[Terms, torch.Tensor | None]:
        """Terms of one worker's share of a step and, with `diagnose`, the contrastive term's statistics."""
        joint = JointStep(batch.num_labelled, len(batch.weak), self.gather)
        terms = self._own_terms(output, batch, joint, generator)
        if self.extra is not None:
            terms["extra"] = self._extra_term(output, batch)
        if self.contrastive is None:
            return terms, None
        assert output.z_weak is not None and output.z_strong is not None
        views = PixelViews(
            output.z_weak,
            output.z_strong,
            output.predictions.mask_logits[-1],
            output.predictions.class_logits[-1],
            batch.valid,
            batch.truth_instance,
            batch.truth_class,
        )
        pxl = contrastive_loss(
            views,
            self.contrastive,
            temperature=temperature_at(step, self.contrastive),
            generator=generator,
            gather=self.gather if self.contrastive.gather else None,
            joint=joint,
            with_diagnostics=diagnose,
        )
        return {**terms, "pxl": (pxl.sum, pxl.count)}, pxl.statistics

    def _extra_term(self, output: Output, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and the count of the user's own term.

        Raises:
            ValueError: it returned something else.
        """
        assert self.extra is not None
        found = self.extra(output, batch)
        parts = found if isinstance(found, tuple | list) else (found,)
        if len(parts) != 2 or not all(isinstance(part, torch.Tensor) and part.numel() == 1 for part in parts):
            got = [f"tensor{list(p.shape)}" if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts]
            raise ValueError(
                f"loss.extra_term {self.loss.extra_term!r}: expected (sum, count), two tensors of one number each, got "
                f"{', '.join(got)}"
            )
        return parts[0], parts[1]

    def diagnose(self, statistics: torch.Tensor, step: int) -> dict[str, float]:
        """Margin, false-negative rate and the rest from a step's statistics, summed over workers."""
        assert self.contrastive is not None
        return diagnose(statistics, temperature_at(step, self.contrastive))

    def _own_terms(self, output: Output, batch: Batch, joint: JointStep, generator: torch.Generator) -> Terms:
        """L_sup and L_semi from one matching: the terms of each image, added up over D_l and over D_u."""
        parts = {"sup": slice(0, batch.num_labelled)}
        if self.loss.lambda_semi > 0:
            parts["semi"] = slice(batch.num_labelled, len(batch.weak))
        used = list(parts.values())[-1].stop
        targets, valid = batch.targets[:used], batch.valid[:used]
        if self.criterion is not None:
            weights = target_weights(batch.targets, self.loss)
            weighted = [Targets(t.masks, t.labels, w, t.ignore) for t, w in zip(batch.targets, weights)]
            of_image = self.criterion(output, weighted)
        else:
            predictions = (output.supervised or output.predictions).part(0, used)
            part = joint if used == len(batch.weak) else joint.labelled
            of_image = set_loss(predictions, targets, self.loss, valid=valid, generator=generator, joint=part)
            if self.proposals:
                of_image |= proposal_loss(predictions.auxiliary, targets, self.loss, valid)
        return {
            f"{part}/{name}": (sums[images].sum(), counts[images].sum())
            for part, images in parts.items()
            for name, (sums, counts) in of_image.items()
        }


def weighted_sum(
    terms: Terms, weights: dict[str, float], all_reduce: Callable[[torch.Tensor], torch.Tensor], world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scalar to differentiate and the mean of each term over all workers.

    DDP averages gradients over workers, so each worker's loss is W * sum_i(local) / sum_i(global count): W workers with
    unequal instance counts give exactly the gradients of one worker with all of them.

    Returns:
        loss: scalar; means: float [len(terms)], detached, in the order of `terms`.
    """
    assert terms.keys() == weights.keys(), (sorted(terms), sorted(weights))
    sums = torch.stack([s.float() for s, _ in terms.values()])
    counts = torch.stack([c.detach().float() for _, c in terms.values()])
    reduced = all_reduce(torch.cat([sums.detach(), counts])).view(2, -1)
    global_counts = torch.where(reduced[1] > 0, reduced[1], 1.0)  # a count of 0 comes with a sum of 0
    scale = torch.tensor([weights[name] for name in terms], device=sums.device)
    loss = (sums * scale / global_counts).sum() * world_size
    return loss, reduced[0] / global_counts
