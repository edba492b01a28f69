"""J of one step: what each term reads, and how often the host waits for the device."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_scenes import CONTRAST, LOSS, MODEL, NUM_CLASSES, make_batch, make_network

from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig, LossConfig

BATCH = make_batch((2, 3, 1, 2), num_labelled=2)
SEMI = LOSS.model_copy(update={"lambda_semi": 0.5})


def terms_of(batch: Any, loss: LossConfig = SEMI, contrastive: ContrastiveConfig | None = None) -> dict[str, Any]:
    network = make_network(contrastive)
    terms, _ = Objective(loss, contrastive)(
        network(batch.weak, batch.strong), batch, 0, torch.Generator().manual_seed(0)
    )
    return {name: (total.detach(), count) for name, (total, count) in terms.items()}


def test_terms_have_the_papers_weights() -> None:
    loss = LossConfig(lambda_semi=0.5, lambda_pxl=0.2)
    weights = Objective(loss, CONTRAST).weights
    assert {n: weights[n] for n in ("sup/class", "sup/mask", "sup/dice", "semi/class", "semi/mask", "semi/dice")} == {
        "sup/class": 2,
        "sup/mask": 5,
        "sup/dice": 5,
        "semi/class": 1,
        "semi/mask": 2.5,
        "semi/dice": 2.5,
    }
    assert weights["pxl"] == 0.2
    assert "pxl" not in Objective(loss, None).weights
    assert not any(name.startswith("semi") for name in Objective(LOSS, None).weights)


def test_parts_are_counted_apart() -> None:
    terms = terms_of(BATCH)
    assert [terms[name][1].item() for name in ("sup/mask", "sup/dice", "semi/mask", "semi/dice")] == [5, 5, 3, 3]
    scored = replace(BATCH, targets=[replace(t, weights=torch.full_like(t.weights, 0.25)) for t in BATCH.targets])
    assert terms_of(scored)["semi/mask"] == terms["semi/mask"]  # hard: a label is a label
    by_score = terms_of(scored, SEMI.model_copy(update={"pseudo_weighting": "score"}))
    assert by_score["semi/mask"][1] == 3
    torch.testing.assert_close(by_score["semi/mask"][0], 0.25 * terms["semi/mask"][0])


@pytest.mark.parametrize("contrastive", [None, CONTRAST])
def test_l_semi_of_the_strong_view_is_that_of_a_step_whose_d_u_is_the_strong_view(contrastive: Any) -> None:
    objective = Objective(SEMI.model_copy(update={"semi_view": "strong"}), contrastive)
    network = make_network(contrastive).eval()
    output = network(BATCH.weak, BATCH.strong, BATCH.targets, BATCH.num_labelled)
    found, _ = objective(output, BATCH, 0, torch.Generator().manual_seed(0))
    mixed = replace(BATCH, weak=torch.cat([BATCH.weak[:2], BATCH.strong[2:]]))
    wanted, _ = Objective(SEMI, None)(network(mixed.weak), mixed, 0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    weak, _ = Objective(SEMI, contrastive)(network(BATCH.weak, BATCH.strong), BATCH, 0, generator)
    for name, (total, count) in wanted.items():
        torch.testing.assert_close(found[name], (total, count))
    for name in ("class", "mask", "dice"):
        torch.testing.assert_close(found[f"sup/{name}"], weak[f"sup/{name}"])
    assert not torch.allclose(found["semi/mask"][0], weak["semi/mask"][0])
    if contrastive is not None:
        torch.testing.assert_close(found["pxl"], weak["pxl"])  # y is the weak view's either way


def test_pseudo_labels_have_no_weight_before_the_burn_in_ends() -> None:
    objective = Objective(SEMI.model_copy(update={"burn_in_fraction": 0.5}), CONTRAST)
    without = {name: 0.0 if name.startswith("semi/") else weight for name, weight in objective.weights.items()}
    assert [objective.weights_at(step / 4) for step in range(4)] == [without] * 2 + [objective.weights] * 2
    assert any(name.startswith("semi/") for name in without) and without["pxl"] == objective.weights["pxl"] > 0


def test_which_views_a_step_reads() -> None:
    strong = SEMI.model_copy(update={"semi_view": "strong"})
    assert not Objective(SEMI, None).reads_strong and Objective(strong, None).reads_strong
    no_labels = strong.model_copy(update={"lambda_semi": 0.0})
    assert not Objective(no_labels, None).reads_strong and not Objective(no_labels, CONTRAST).is_semi_strong


@pytest.mark.parametrize("kind", ["cast", "infonce", "pc2seg"])
@pytest.mark.parametrize("sampler", ["uniform", "mask", "class", "fusion"])
def test_the_truth_enters_no_loss_but_the_oracles(kind: str, sampler: str) -> None:
    config = CONTRAST.model_copy(update={"kind": kind, "sampler": sampler})
    other = replace(BATCH, truth_instance=1 - BATCH.truth_instance, truth_class=1 - BATCH.truth_class)
    assert terms_of(BATCH, contrastive=config) == terms_of(other, contrastive=config)


def test_the_oracle_reads_the_truth_where_it_is_known() -> None:
    config = CONTRAST.model_copy(update={"sampler": "oracle", "num_anchors": None})
    labelled = terms_of(BATCH, contrastive=config)["pxl"]
    assert labelled[1] == 2 * 4 * 4  # anchors of D_l alone: the truth of D_u is hidden
    known = make_batch((2, 3, 1, 2), num_labelled=4)
    assert terms_of(replace(known, num_labelled=2), contrastive=config)["pxl"][1] == 4 * 4 * 4


def test_the_local_batch_asks_other_workers_for_numbers_of_instances_only() -> None:
    """Those say how much is drawn for the images of others, see `JointStep`."""

    class Refusing:
        rank, size = 0, 2

        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point() or tensor.numel() > len(BATCH.weak):
                raise AssertionError("gathered")
            return torch.cat([tensor, tensor])

    network = make_network(CONTRAST)
    output = network(BATCH.weak, BATCH.strong)
    for column in ("released", "paper"):
        config = ContrastiveConfig(**CONTRASTIVE_PRESETS[column])
        objective = Objective(LOSS, config, Refusing())
        if column == "released":
            objective(output, BATCH, 0, torch.Generator())
        else:
            with pytest.raises(AssertionError, match="gathered"):
                objective(output, BATCH, 0, torch.Generator())


class HostReads(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: scalars that are read, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2"):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("column", ["paper", "released"])
def test_the_host_waits_once_a_step(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ContrastiveConfig(**CONTRASTIVE_PRESETS[column])
    model = MODEL.model_copy(update={"proposals": False})
    network = CastNetwork(build_segmenter(model, NUM_CLASSES, seed=0), config)
    output = network(BATCH.weak, BATCH.strong)
    copies: list[int] = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or real(tensor))
    objective, reads = Objective(SEMI, config, proposals=False), HostReads()
    with reads:
        terms, _ = objective(output, BATCH, 0, torch.Generator().manual_seed(0))
        loss, _ = weighted_sum(terms, objective.weights, World().all_reduce_sum, 1)
        loss.backward()
    assert copies == [1] and reads.found == []


def half_of_all_masks(output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A term of a user's own."""
    masks = output.predictions.mask_logits[-1]
    return masks.sum() / 2, torch.tensor(float(masks.numel()))


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (torch.tensor(1.0), r"tensor\[\]"),
        ((torch.ones(3), torch.tensor(1.0)), r"tensor\[3\], tensor\[\]"),
        ((1.0, 2), "float, int"),
        ("text", "str"),
        (None, "NoneType"),
    ],
)
def test_a_term_of_ones_own_that_is_no_sum_and_count(monkeypatch: pytest.MonkeyPatch, found: Any, got: str) -> None:
    module = ModuleType("own_terms")
    module.wrong = lambda output, batch: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_terms", module)
    loss = SEMI.model_copy(update={"extra_term": "own_terms:wrong"})
    output = make_network(None)(BATCH.weak, BATCH.strong)
    with pytest.raises(ValueError, match=rf"loss.extra_term 'own_terms:wrong': expected \(sum, count\), .* got {got}$"):
        Objective(loss, None)(output, BATCH, 0, torch.Generator().manual_seed(0))


def test_a_term_of_ones_own_is_added_to_j(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_terms")
    module.half = half_of_all_masks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_terms", module)
    loss = SEMI.model_copy(update={"extra_term": "own_terms:half", "extra_weight": 0.25})
    for contrastive in (None, CONTRAST):
        network = make_network(contrastive)
        output = network(BATCH.weak, BATCH.strong)
        objective = Objective(loss, contrastive)
        terms, _ = objective(output, BATCH, 0, torch.Generator().manual_seed(0))
        assert list(terms) == list(objective.weights) and objective.weights["extra"] == 0.25  # means are by place
        without, _ = Objective(SEMI, contrastive)(output, BATCH, 0, torch.Generator().manual_seed(0))
        j, j_without = (
            weighted_sum(t, {n: objective.weights[n] for n in t}, World().all_reduce_sum, 1)[0]
            for t in (terms, without)
        )
        expected = output.predictions.mask_logits[-1].mean() / 2 * 0.25
        assert torch.allclose(j - j_without, expected, atol=1e-5)
