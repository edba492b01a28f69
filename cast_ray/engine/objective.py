"""J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl of one step, as sums and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cast_ray.losses.contrastive import contrastive_loss, temperature_at
from cast_ray.losses.pixel_contrast import Gather
from cast_ray.losses.proposals import proposal_loss, proposal_weights
from cast_ray.losses.set_criterion import set_loss, slice_predictions
from cast_ray.models.network import Output
from cast_ray.recipe import ContrastiveConfig, LossConfig
from cast_ray.records import Batch, Predictions, Targets

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Criterion(Protocol):
    """The supervised terms of a network that is not a segmenter, by exact name."""

    weights: dict[str, float]

    def __call__(self, output: Output, targets: Sequence[Targets]) -> Terms:
        """Per term (sum [B], count [B]), one entry per image."""
        ...


class Objective:
    """The loss of every stage. `weights` holds the weight of each term by exact name.

    Terms: `sup/<term>` on D_l, `semi/<term>` on pseudo-labels (both the set loss and, for models with proposals, their
    auxiliary loss, or the terms of `criterion`), `pxl` on all images of the step.

    Args:
        loss: weights of the terms.
        contrastive: None: without L_pxl.
        gather: of the contrastive term's candidates.
        criterion: of a network that is not a segmenter.
        proposals: whether the segmenter has any, as its config says.
    """

    def __init__(
        self,
        loss: LossConfig,
        contrastive: ContrastiveConfig | None,
        gather: Gather | None = None,
        criterion: Criterion | None = None,
        proposals: bool = True,
    ):
        self.loss, self.contrastive, self.gather, self.criterion = loss, contrastive, gather, criterion
        own = {"class": loss.class_weight, "mask": loss.mask_weight, "dice": loss.dice_weight}
        if criterion is not None:
            own = criterion.weights
        elif proposals:
            own |= proposal_weights(loss)
        self.weights = {f"sup/{name}": weight for name, weight in own.items()}
        if loss.lambda_semi > 0:
            self.weights |= {f"semi/{name}": loss.lambda_semi * weight for name, weight in own.items()}
        if contrastive is not None:
            self.weights["pxl"] = loss.lambda_pxl

    def __call__(
        self, output: Output, batch: Batch, step: int, generator: torch.Generator, diagnose: bool = False
    ) -> tuple[Terms, dict[str, torch.Tensor]]:
        """Terms of one worker's share of a step and, with `diagnose`, the contrastive diagnostics (0-d tensors)."""
        n, total = batch.num_labelled, len(batch.weak)
        if self.criterion is not None:
            terms = self._criterion_terms(output, batch)
        else:
            terms = self._set_terms("sup", output.predictions, batch.targets, batch.valid, 0, n, generator)
            if self.loss.lambda_semi > 0:
                terms |= self._set_terms("semi", output.predictions, batch.targets, batch.valid, n, total, generator)
        diagnostics: dict[str, torch.Tensor] = {}
        if self.contrastive is not None:
            assert output.z_weak is not None and output.z_strong is not None
            pxl = contrastive_loss(
                output.z_weak,
                output.z_strong,
                output.predictions.mask_logits[-1],
                output.predictions.class_logits[-1],
                batch.valid,
                batch.truth_instance,
                batch.truth_class,
                self.contrastive,
                temperature=temperature_at(step, self.contrastive),
                generator=generator,
                gather=self.gather if self.contrastive.gather else None,
                with_diagnostics=diagnose,
            )
            terms["pxl"] = (pxl.sum, pxl.count)
            diagnostics = pxl.diagnostics
        return terms, diagnostics

    def _criterion_terms(self, output: Output, batch: Batch) -> Terms:
        """The criterion's terms of each image, added up over D_l and over D_u."""
        assert self.criterion is not None
        parts = {"sup": slice(0, batch.num_labelled)}
        if self.loss.lambda_semi > 0:
            parts["semi"] = slice(batch.num_labelled, len(batch.weak))
        targets = batch.targets
        if self.loss.pseudo_weighting == "hard":
            targets = [Targets(t.masks, t.labels, torch.ones_like(t.weights), t.ignore) for t in targets]
        of_image = self.criterion(output, targets)
        return {
            f"{part}/{name}": (of_image[name][0][images].sum(), of_image[name][1][images].sum())
            for part, images in parts.items()
            for name in self.criterion.weights
        }

    def _set_terms(
        self,
        prefix: str,
        predictions: Predictions,
        targets: list[Targets],
        valid: torch.Tensor,
        start: int,
        stop: int,
        generator: torch.Generator,
    ) -> Terms:
        part = slice_predictions(predictions, start, stop)
        share = targets[start:stop]
        if prefix == "semi" and self.loss.pseudo_weighting == "hard":
            share = [Targets(t.masks, t.labels, torch.ones_like(t.weights), t.ignore) for t in share]
        terms = dict(set_loss(part, share, self.loss, valid=valid[start:stop], generator=generator))
        if part.auxiliary:
            terms |= proposal_loss(part.auxiliary, share, self.loss)
        return {f"{prefix}/{name}": pair for name, pair in terms.items()}


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
    global_counts = reduced[1].clamp(min=1e-6)
    scale = torch.tensor([weights[name] for name in terms], device=sums.device)
    loss = (sums * scale / global_counts).sum() * world_size
    return loss, reduced[0] / global_counts
