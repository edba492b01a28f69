"""A second kind of device for machines without a GPU, and a stage that is resumed on it.

Its tensors live in main memory. An operation that mixes them with tensors of the CPU fails, as on a GPU. The device is
registered for a whole process, so that tests run this file in a process of its own:

python tests/helpers/second_device.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cast_ray.contracts.records import Batch, Predictions
from cast_ray.engine import loop
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.objective import Objective, Terms
from cast_ray.engine.world import World
from cast_ray.models.cast_network import Output, TrainedNetwork
from cast_ray.recipe import TrainConfig

NAME = "stub"
SCHEDULE = TrainConfig(steps=17, checkpoint_every_steps=4, lr=3e-3, ema=0.9)
LAST_CHECKPOINT = 16
"""Steps 11 to 16 are not in the learning curve yet: the checkpoint carries their terms."""
assert LAST_CHECKPOINT % loop.LOG_EVERY_STEPS != 0

_values: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
"""Values of the device's tensors by the identity of their storage, which is kept so that it is not used twice."""


def _on_device(values: torch.Tensor) -> torch.Tensor:
    """A tensor of the device that stands for `values`."""
    tensor: torch.Tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)  # type: ignore[attr-defined]
    storage = tensor.untyped_storage()
    _values[storage._cdata] = (storage, values)
    return tensor


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _on_cpu(value: Any) -> Any:
    if _is_here(value):
        return _values[value.untyped_storage()._cdata][1]
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of the device, by the CPU's."""
    flat, form = pytree.tree_flatten((args, kwargs))
    if op.name() == "aten::_copy_from":
        _on_cpu(args[1]).copy_(_on_cpu(args[0]))
        return args[1]
    if any(isinstance(v, torch.Tensor) and not _is_here(v) and v.dim() > 0 for v in flat):
        raise RuntimeError(f"{op.name()}: expected all tensors on {NAME}, found one on the CPU")
    mine = {id(_on_cpu(v)): v for v in flat if _is_here(v)}
    on_cpu_args, on_cpu_kwargs = pytree.tree_unflatten([_on_cpu(v) for v in flat], form)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return mine[id(value)] if id(value) in mine else _on_device(value)

    return pytree.tree_map(wrapped, op(*on_cpu_args, **on_cpu_kwargs))


class Network(TrainedNetwork):
    """One layer; its output is the mask logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    @property
    def trained(self) -> nn.Module:
        return self.layer

    def lr_factors(self, config: TrainConfig) -> dict[int, float]:
        return {id(self.layer.bias): 0.5}

    def forward(self, weak: torch.Tensor, strong: torch.Tensor | None = None, targets: Any = ()) -> Output:
        return Output(Predictions([], [self.layer(weak)], {}, {}))


class Squares:
    """Two terms: the squares of the output, and of its distance to 1."""

    def __init__(self) -> None:
        self.weights = {"a": 1.0, "b": 0.5}
        self.contrastive = None
        self.reads_strong = self.is_semi_strong = False

    def weights_at(self, progress: float) -> dict[str, float]:
        return self.weights

    def __call__(self, output: Output, batch: Batch, *_: Any, **__: Any) -> tuple[Terms, None]:
        logits = output.predictions.mask_logits[-1]
        count = torch.ones((), device=logits.device)
        return {"a": (logits.square().sum(), count), "b": ((logits - 1).square().sum(), count)}, None


def _batches(start: int) -> Iterator[Batch]:
    for step in range(start, SCHEDULE.steps):
        weak = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        none = torch.zeros(0)
        yield Batch(weak, none, none, [], 2, none, none)


def _train(device: torch.device, resume: TrainState | None, folder: str) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The curve without what depends on the clock, and the trained weight."""
    torch.manual_seed(0)
    network = Network()

    def save(state: TrainState) -> None:
        if state.step == LAST_CHECKPOINT:
            # A Python device has no storage that could be pickled.
            TrainState(**pytree.tree_map(lambda v: v.cpu() if _is_here(v) else v, vars(state))).save(folder)

    result = loop.train(
        network,
        cast(Objective, Squares()),
        _batches(resume.step if resume else 0),
        SCHEDULE,
        loop.RunSettings("f", 0, World(device=device), resume=resume, hooks=loop.TrainHooks(on_checkpoint=save)),
    )
    curve = [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in result.curve]
    return curve, network.layer.weight.detach().cpu()


def main(folder: str) -> None:
    _setup_privateuseone_for_python_backend(NAME)
    operations = torch.library.Library("_", "IMPL")
    operations.fallback(_run, "PrivateUse1")
    # A Python device cannot have a random source of its own; the terms above draw nothing.
    loop.step_generator = lambda *_: torch.Generator()
    device = torch.device(NAME)
    here = torch.ones(2, device=device)
    try:
        torch.stack([here, torch.ones(2)])
    except RuntimeError as error:
        assert "expected all tensors on stub" in str(error)
    else:
        raise AssertionError("this device takes tensors of the CPU")

    curve, weight = _train(device, None, folder)
    state = TrainState.load(folder, "f")
    assert state is not None and len(state.recent) == 6
    resumed_curve, resumed_weight = _train(device, state, folder)
    assert resumed_curve == curve and [entry["step"] for entry in curve] == [10, 17]
    assert torch.equal(resumed_weight, weight)
    assert not torch.equal(weight, Network().layer.weight)
    print("resumed")


if __name__ == "__main__":
    main(sys.argv[1])
