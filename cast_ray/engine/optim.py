"""Optimiser, learning-rate schedule as a pure function of the step, and weight average."""

from __future__ import annotations

import torch
from torch import nn

from cast_ray.models.cast_network import TrainedNetwork
from cast_ray.recipe import TrainConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDING_NAMES = ("embed", "token", "position_bias_table")
"""In the last part of a bare parameter's name: class and register tokens, learnt positions, Swin's bias tables."""


def build_optimizer(network: TrainedNetwork, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the learning rates of `network.lr_factors`.

    Never decayed, as in Mask2Former: norms and embeddings, learnt positions included. Mask2Former decays biases and
    other vectors (layer scales); here they are decayed only with `decay_biases`.
    """
    factors = network.lr_factors(config)
    exempt = _embeddings(network) | _norms(network)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            decayed = (parameter.ndim > 1 or config.decay_biases) and id(parameter) not in exempt
            groups.setdefault((factors.get(id(parameter), 1.0), decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base_lr": config.lr * factor,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (factor, decayed), parameters in groups.items()
        ],
        lr=config.lr,
        fused=True,
    )


def _embeddings(network: nn.Module) -> set[int]:
    """ids of the weights that are looked up or added, not multiplied with."""
    found = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    leaves = ((name.rpartition(".")[2], p) for name, p in network.named_parameters())
    return found | {id(p) for leaf, p in leaves if any(part in leaf for part in _EMBEDDING_NAMES)}


def _norms(network: nn.Module) -> set[int]:
    """ids of the weights of norms; kinds of transformers' own (RMS norms) are known by their name."""
    norms = (m for m in network.modules() if isinstance(m, _NORMS) or type(m).__name__.endswith("Norm"))
    return {id(p) for m in norms for p in m.parameters(recurse=False)}


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate at `step` (0-based) relative to its peak.

    hold-decay: 1, then linear to 0 over the last `decay_fraction`; poly: (1 - step/steps)^poly_power (the released
    code's schedule); constant: 1. All after a linear warm-up of `warmup_steps`.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = 1.0 - step / max(config.steps, 1)
    if config.schedule == "poly":
        return warmup * left**config.poly_power
    if config.schedule == "hold-decay" and config.decay_fraction > 0:
        return warmup * min(1.0, left / config.decay_fraction)
    return warmup


def set_lr(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Sets every group's rate for `step`; returns the factor."""
    factor = lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return factor


class WeightAverage:
    """Exponential moving average of a module's floating parameters: theta_bar <- d theta_bar + (1 - d) theta.

    d grows from 0.1 as (1 + t) / (10 + t) up to `decay`, so that a short stage is not held back by its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.live = [p for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def write_to(self, module: nn.Module) -> None:
        """Puts the average into `module` (of the same architecture)."""
        for parameter, average in zip(module.parameters(), self.average, strict=True):
            parameter.copy_(average)


def averaged_weights(module: nn.Module, average: WeightAverage | None) -> dict[str, torch.Tensor]:
    """Returns the state of a module with the averages of its parameters in their place, or the state as it
    is if there is no average."""
    state = module.state_dict()
    if average is not None:
        averages = {id(live): mean for live, mean in zip(average.live, average.average)}
        state |= {name: averages[id(parameter)] for name, parameter in module.named_parameters()}
    return state


def learnt_weights(module: nn.Module, average: WeightAverage | None) -> dict[str, torch.Tensor]:
    """The part of `averaged_weights` that training changes, each once: frozen parameters may be most of a teacher.

    A parameter that several layers share has its first name only.
    """
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    learnt = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in averaged_weights(module, average).items() if name not in every - learnt}
