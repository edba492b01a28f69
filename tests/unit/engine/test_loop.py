"""The training loop: it learns, it resumes bit for bit, a switched-off term leaves no trace, it stops on NaN."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from training_scenes import CONTRAST, LOSS, batches, make_batch, make_network, run

from cast_ray.contracts.records import Batch, Predictions
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.loop import Interrupted
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.models.segmenter import Segmenter
from cast_ray.recipe import ContrastiveConfig, LossConfig, TrainConfig

SHORT = TrainConfig(steps=16, checkpoint_every_steps=6, lr=3e-3, ema=0.9)
SEMI = LOSS.model_copy(update={"lambda_semi": 0.5})
EMA_HEAD = CONTRAST.model_copy(update={"head": "ema", "head_ema": 0.9})
FROZEN_HEAD = CONTRAST.model_copy(update={"head": "frozen", "strong_grad": False})


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_the_loss_falls_on_one_batch_and_the_average_is_handed_on() -> None:
    batch = make_batch((2, 3, 1, 2), num_labelled=2)
    config = TrainConfig(steps=40, lr=5e-3, ema=0.9)
    trained = run(config, repeat(batch), loss=SEMI, contrastive=CONTRAST)
    curve = trained.result.curve
    assert [e["step"] for e in curve] == [10, 20, 30, 40]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert {"sup/class", "sup/mask", "sup/dice", "semi/class", "semi/dice", "sup/proposal_mask", "pxl"} <= set(curve[0])
    assert all(e["images_per_s"] > 0 for e in curve)

    # The handed-on weights do better than the initial ones on the same batch.
    def total(network) -> float:
        objective = Objective(SEMI, CONTRAST)
        with torch.no_grad():
            terms, _ = objective(network(batch.weak, batch.strong), batch, 40, torch.Generator().manual_seed(0))
        return float(weighted_sum(terms, objective.weights, World().all_reduce_sum, 1)[0])

    assert total(trained.network) < 0.5 * total(make_network(CONTRAST))


@pytest.mark.parametrize(("steps", "reads"), [(4, False), (6, True)])
def test_pseudo_labels_change_nothing_before_the_burn_in_ends(steps: int, reads: bool) -> None:
    """The first 4 of 8 steps of a stage, which is looked at after some of them."""
    loss = SEMI.model_copy(update={"burn_in_fraction": 0.5})
    config = TrainConfig(steps=8, lr=3e-3, ema=0.0, schedule="constant", checkpoint_every_steps=1)

    def labelled(shift: int) -> Iterator[Batch]:
        for batch in batches(0, 8, num_labelled=1):
            others = [replace(t, masks=t.masks.roll(shift, 1)) for t in batch.targets[1:]]
            yield replace(batch, targets=batch.targets[:1] + others)

    mine, other = (run(config, labelled(shift), loss=loss).states[steps - 1].network for shift in (0, 7))
    assert any(not torch.equal(mine[name], other[name]) for name in mine) == reads


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_snapshots_are_what_would_be_handed_on_and_change_nothing(ema: float) -> None:
    config = SHORT.model_copy(update={"ema": ema, "checkpoint_every_steps": 5})
    alone = run(config, batches(0, 16, num_labelled=1), loss=SEMI, contrastive=CONTRAST)
    snapshots: dict[int, dict[str, torch.Tensor]] = {}

    def disturb(step: int, weights: dict[str, torch.Tensor]) -> None:
        snapshots[step] = {name: tensor.clone() for name, tensor in weights.items()}
        for tensor in weights.values():  # a copy: whatever is done to it is nothing to the training
            tensor.zero_()

    watched = run(
        config,
        batches(0, 16, num_labelled=1),
        loss=SEMI,
        contrastive=CONTRAST,
        snapshot_every_steps=5,
        on_snapshot=disturb,
    )
    assert_same(watched.network.state_dict(), alone.network.state_dict())
    assert watched.curve == alone.curve
    assert list(snapshots) == [5, 10, 15]
    for state in watched.states:
        network = make_network(CONTRAST)
        network.load_state_dict(state.network)
        if state.average is not None:
            for parameter, average in zip(network.parameters(), state.average["average"], strict=True):
                parameter.data.copy_(average)
        assert_same(snapshots[state.step], network.segmenter.state_dict())


@pytest.mark.parametrize(
    ("loss", "contrastive"),
    [(LOSS, None), (SEMI, CONTRAST), (LOSS, EMA_HEAD), (LOSS, FROZEN_HEAD)],
    ids=["supervised", "contrastive with a temperature schedule", "averaged head", "frozen head"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    loss: LossConfig, contrastive: ContrastiveConfig | None, tmp_path: Path
) -> None:
    whole = run(SHORT, batches(0, 16, num_labelled=1), loss=loss, contrastive=contrastive)

    class Killed(Exception):
        pass

    def save_and_die(state: TrainState) -> None:
        if state.step == 12:
            state.save(tmp_path)
            raise Killed

    with pytest.raises(Killed):
        run(
            SHORT,
            batches(0, 16, num_labelled=1),
            loss=loss,
            contrastive=contrastive,
            on_checkpoint=save_and_die,
        )
    state = TrainState.load(tmp_path, "f")
    assert state is not None and state.step == 12
    resumed = run(SHORT, batches(12, 16, num_labelled=1), loss=loss, contrastive=contrastive, resume=state)
    assert_same(resumed.network.state_dict(), whole.network.state_dict())
    assert resumed.curve == whole.curve
    assert [e["step"] for e in whole.curve] == [10, 16]
    assert [d["step"] for d in resumed.result.diagnostics] == [d["step"] for d in whole.result.diagnostics]
    if contrastive is not None:
        temperatures = {d["step"]: d["temperature"] for d in resumed.result.diagnostics}
        assert temperatures == {d["step"]: d["temperature"] for d in whole.result.diagnostics}
        # 3 and 15 steps done: T of steps 2 and 14 of 20.
        assert temperatures[3] == pytest.approx(0.3 - 0.23 * 2 / 20)
        assert temperatures[15] == pytest.approx(0.3 - 0.23 * 14 / 20)


@pytest.mark.parametrize(("told", "ends"), [(3, 5), (5, 5), (6, 10)])
def test_a_run_that_is_to_leave_its_node_saves_what_it_has(told: int, ends: int, tmp_path: Path) -> None:
    """The workers look each 5 steps; SHORT itself saves after 6 and 12 steps of 16."""
    whole = run(SHORT, batches(0, 16))
    states: list[TrainState] = []
    drawn: list[Batch] = []

    def counted() -> Iterator[Batch]:
        for batch in batches(0, 16):
            drawn.append(batch)
            yield batch

    def save(state: TrainState) -> None:
        state.save(tmp_path)
        states.append(state)

    with pytest.raises(Interrupted, match=f"saved after step {ends} of 16"):
        run(SHORT, counted(), on_checkpoint=save, is_leaving=lambda: len(drawn) >= told)
    assert [state.step for state in states] == ([5] if ends == 5 else [6, 10])
    state = TrainState.load(tmp_path, "f")
    assert state is not None and state.step == ends
    resumed = run(SHORT, batches(ends, 16), resume=state)
    assert_same(resumed.network.state_dict(), whole.network.state_dict())


def test_a_stage_resumes_on_a_device_that_is_not_the_cpu(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "helpers" / "second_device.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout == "resumed\n", done.stderr


def test_another_stages_checkpoint_is_not_taken(tmp_path: Path) -> None:
    states = run(SHORT, batches(0, 16)).states
    assert [s.step for s in states] == [6, 12]
    states[0].save(tmp_path)
    assert TrainState.load(tmp_path, "g") is None
    with pytest.raises(FileNotFoundError):
        TrainState.load(tmp_path / "gone", "f")


def test_no_checkpoint_after_the_last_step() -> None:
    config = SHORT.model_copy(update={"steps": 12})
    assert [s.step for s in run(config, batches(0, 12)).states] == [6]


def test_a_run_that_is_stopped_early_has_the_beginning_of_the_whole_one() -> None:
    config = TrainConfig(steps=24, lr=1e-2, warmup_steps=4)
    whole = run(config, batches(0, 24))
    left = batches(0, 24)
    stopped = run(config, left, stop_step=13)
    assert stopped.curve == whole.curve[:1] and stopped.curve[0]["step"] == 10
    assert len(list(left)) == 24 - 13
    assert not stopped.states


def test_seconds_go_on_over_a_resume() -> None:
    first = run(SHORT, batches(0, 16))
    assert first.result.seconds > first.states[1].seconds > first.states[0].seconds > 0
    state = first.states[1]
    state.seconds = 1e6
    assert run(SHORT, batches(12, 16), resume=state).result.seconds > 1e6


def test_another_seed_is_another_run() -> None:
    config = SHORT.model_copy(update={"steps": 3})
    one, same, other = (run(config, batches(0, 3), seed=s) for s in (0, 0, 1))
    assert_same(one.network.state_dict(), same.network.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(one.weights.values(), other.weights.values()))


@pytest.mark.parametrize("schedule", ["hold-decay", "poly", "constant"])
def test_the_curve_tells_the_rate_of_its_step(schedule: str) -> None:
    config = TrainConfig(steps=10, lr=1e-3, schedule=schedule, decay_fraction=0.5)
    (entry,) = run(config, batches(0, 10)).result.curve
    left = 0.1  # at the last step
    wanted = {"hold-decay": left / 0.5, "poly": left**0.9, "constant": 1.0}[schedule]
    assert entry["lr"] == pytest.approx(1e-3 * wanted)


def test_a_term_of_weight_zero_is_no_term() -> None:
    # Never clipped: more zeros in the norm's sum may round it another way.
    config = TrainConfig(steps=5, lr=3e-3, ema=0, clip_norm=1e6)
    without = run(config, batches(0, 5))
    zero = LOSS.model_copy(update={"lambda_pxl": 0.0})
    weighted = run(config, batches(0, 5), loss=zero, contrastive=CONTRAST)
    assert_same(weighted.weights, without.weights)
    counted = run(config, batches(0, 5), loss=LOSS, contrastive=CONTRAST)
    assert any(not torch.equal(a, b) for a, b in zip(counted.weights.values(), without.weights.values()))


def test_no_pseudo_label_term_reads_no_pseudo_label() -> None:
    config = TrainConfig(steps=3, lr=3e-3, ema=0)

    def stream(relabel: bool):
        for batch in batches(0, 3, counts=(2, 3), num_labelled=1):
            if relabel:
                batch.targets[1].labels = (batch.targets[1].labels + 1) % 3
            yield batch

    one, other = (run(config, stream(relabel), loss=LOSS) for relabel in (False, True))
    assert_same(one.weights, other.weights)
    semi = run(config, stream(True), loss=SEMI)
    assert any(not torch.equal(a, b) for a, b in zip(semi.weights.values(), other.weights.values()))


class Breaking(Objective):
    """A term that is not finite in one step."""

    def __init__(self, at: int, value: float):
        super().__init__(LOSS, None)
        self.at, self.value = at, value

    def __call__(self, output, batch, step, generator, diagnose=False):
        terms, facts = super().__call__(output, batch, step, generator, diagnose)
        if step + 1 == self.at:
            terms["sup/dice"] = (terms["sup/dice"][0] * self.value, terms["sup/dice"][1])
        return terms, facts


@pytest.mark.parametrize("at", [1, 5, 6, 10, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(at: int, value: float) -> None:
    states: list[TrainState] = []
    with pytest.raises(FloatingPointError, match=rf"not finite at step {at}: .*'sup/dice': (nan|inf)"):
        run(
            SHORT,
            batches(0, 16),
            objective=Breaking(at, value),
            on_checkpoint=lambda state: states.append(copy.deepcopy(state)),
        )
    assert all(s.step < at for s in states)  # no state that cannot go on replaces one that can
    for state in states:
        assert all(t.isfinite().all() for t in state.network.values())


def test_a_stream_that_ends_early_names_the_step() -> None:
    with pytest.raises(ValueError, match="ended at step 4 of 16"):
        run(SHORT, batches(0, 4))


def test_bad_targets_name_the_step() -> None:
    def stream():
        for step, batch in enumerate(batches(0, 4)):
            if step == 2:
                batch.targets[0].labels[:] = 7
            yield batch

    with pytest.raises(ValueError, match=r"step 3: .*expected labels in 0\.\.2"):
        run(SHORT, stream())


def test_a_stage_of_no_steps_hands_on_its_weights() -> None:
    trained = run(TrainConfig(steps=0), batches(0, 0))
    assert_same(trained.network.state_dict(), make_network(None).state_dict())
    assert trained.result.curve == []


def test_on_log_sees_the_curve() -> None:
    seen: list[dict[str, float]] = []
    config = TrainConfig(steps=12)
    trained = run(config, batches(0, 12), on_log=seen.append)
    assert seen == trained.result.curve and [e["step"] for e in seen] == [10, 12]


def test_sums_are_divided_by_the_counts_of_all_workers() -> None:
    mine = {"a": (torch.tensor(6.0, requires_grad=True), torch.tensor(2.0)), "b": (torch.zeros(()), torch.zeros(()))}
    theirs = {"a": (4.0, 6.0), "b": (3.0, 1.0)}

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([theirs[n][0] for n in theirs] + [theirs[n][1] for n in theirs])

    loss, means = weighted_sum(mine, {"a": 0.5, "b": 2.0}, all_reduce, world_size=2)
    assert means.tolist() == [10 / 8, 3.0] and not means.requires_grad
    # W * sum_i(local) / sum_i(global count), which DDP's mean over W workers turns into the joint mean.
    assert loss.item() == pytest.approx(2 * 0.5 * 6 / 8)
    (grad,) = torch.autograd.grad(loss, mine["a"][0])
    assert float(grad) == pytest.approx(2 * 0.5 / 8)


def test_a_term_without_any_count_is_zero() -> None:
    nothing = torch.zeros((), requires_grad=True)
    loss, means = weighted_sum({"a": (nothing * 0, torch.zeros(()))}, {"a": 5.0}, lambda t: t, 1)
    loss.backward()
    assert loss.item() == 0 and means.tolist() == [0] and nothing.grad == 0


def test_terms_without_a_weight_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        weighted_sum({"a": (torch.zeros(()), torch.ones(()))}, {"b": 1.0}, lambda t: t, 1)


def test_images_without_instances_train() -> None:
    batch = make_batch((0, 0), num_labelled=1)
    trained = run(TrainConfig(steps=3, ema=0), repeat(batch), loss=SEMI, contrastive=CONTRAST)
    assert all(t.isfinite().all() for t in trained.weights.values())
    assert trained.result.curve[-1]["sup/mask"] == 0


def test_half_precision_trains_on_the_cpu_too() -> None:
    batch = make_batch((2, 3), num_labelled=2)
    trained = run(TrainConfig(steps=20, lr=5e-3, ema=0.9), repeat(batch), amp="bf16", contrastive=CONTRAST)
    assert trained.result.curve[-1]["loss"] < trained.result.curve[0]["loss"]
    assert {t.dtype for t in trained.weights.values()} == {torch.float32}


class Overflowing(Objective):
    """A loss whose gradients leave float16's range in some steps."""

    def __init__(self, steps: set[int]):
        super().__init__(LOSS, None)
        self.steps = steps

    def __call__(self, output, batch, step, generator, diagnose=False):
        terms, facts = super().__call__(output, batch, step, generator, diagnose)
        factor = 1e30 if step + 1 in self.steps else 1.0
        return {name: (sums * factor, counts) for name, (sums, counts) in terms.items()}, facts


def overflowing_forward(steps: set[int]) -> Any:
    """Class logits of the training network beyond float16's range in some steps, counted by its forward passes."""
    done = 0
    whole = Segmenter.forward

    def forward(self: Segmenter, images: torch.Tensor) -> Predictions:
        nonlocal done
        done += 1
        found = whole(self, images)
        if done in steps:
            found.class_logits[0] = found.class_logits[0] * 1e6
        return found

    return mock.patch.object(Segmenter, "forward", forward)


@pytest.fixture
def small_scale() -> Iterator[None]:
    """A first scale at which this network's own gradients fit into float16."""
    with mock.patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0)):
        yield


def test_gradients_that_overflow_at_the_first_scale_do_not_end_the_stage() -> None:
    trained = run(SHORT, batches(0, 16), amp="fp16")
    assert trained.result.num_skipped > 0  # 65536 times this loss's gradients
    assert all(t.isfinite().all() for t in trained.weights.values())
    assert trained.curve[-1]["step"] == 16 and trained.curve[-1]["loss"] < trained.curve[0]["loss"]


@pytest.mark.usefixtures("small_scale")
@pytest.mark.parametrize("where", ["gradients", "forward pass", "forward pass of parts"])
def test_a_step_that_overflows_in_float16_is_left_out_and_counted(where: str) -> None:
    config = SHORT.model_copy(update={"accumulate": 2 if where.endswith("parts") else 1, "clip_norm": 0.01})
    bad = {3, 4, 12}
    if where == "gradients":
        trained = run(config, batches(0, 16), amp="fp16", objective=Overflowing(bad))
    else:  # a step with two parts has four forward passes
        passes = {4 * step - 3 for step in bad} if config.accumulate == 2 else bad
        with overflowing_forward(passes):
            trained = run(config, batches(0, 16), amp="fp16")
    assert trained.result.num_skipped == 3
    assert all(t.isfinite().all() for t in trained.weights.values())
    assert [e["step"] for e in trained.curve] == [10, 16]
    assert all(math.isfinite(value) for entry in trained.curve for value in entry.values())
    assert [(s.step, s.num_skipped) for s in trained.states] == [(6, 2), (12, 3)]
    assert trained.states[1].scaler["scale"] == 64 / 8


@pytest.mark.usefixtures("small_scale")
def test_a_step_that_overflows_moves_neither_the_weights_nor_their_average() -> None:
    config = SHORT.model_copy(update={"schedule": "constant"})
    before = run(config.model_copy(update={"steps": 2}), batches(0, 2), amp="fp16")
    with overflowing_forward({3, 4}):
        after = run(config.model_copy(update={"steps": 4}), batches(0, 4), amp="fp16")
    assert after.result.num_skipped == 2
    assert_same(after.weights, before.weights)


@pytest.mark.usefixtures("small_scale")
def test_a_resumed_stage_goes_on_counting_overflows() -> None:
    state = run(SHORT, batches(0, 16), amp="fp16", objective=Overflowing({3, 4, 14})).states[1]
    assert state.num_skipped == 2
    resumed = run(SHORT, batches(12, 16), amp="fp16", objective=Overflowing({14}), resume=state)
    assert resumed.result.num_skipped == 3


def test_float16_that_overflows_in_every_step_ends_the_stage() -> None:
    always = Overflowing(set(range(1, 100)))
    with pytest.raises(FloatingPointError, match=r"overflowed in 50 steps .*up to step 50: expected runtime\.amp=bf16"):
        run(SHORT.model_copy(update={"steps": 60}), batches(0, 60), amp="fp16", objective=always)
