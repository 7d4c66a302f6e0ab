"""The optimizers that ``--optimizer`` names: a new one is an entry here.

An entry says how the optimizer is built and what it keeps of each parameter, which checkpoints hold and plans
count. It has to step flat pieces of parameters entry by entry, as ZeRO cuts them anywhere; soft-masks on
updates look at the weights before and after a step, and work with any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from dga_scale.config.settings import OptimizationSettings
from dga_scale.errors import UserError

Groups = list[dict[str, Any]]
"""Parameter groups with their ``weight_decay``, as torch optimizers take them."""


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        type: the class of what ``build`` makes.
        build: makes it of parameter groups and settings, with learning rate 0: the loop sets it each step.
        moments: what its state holds for each entry that it steps, in fp32, by name.

    """

    type: type[Optimizer]
    build: Callable[[Groups, OptimizationSettings], Optimizer]
    moments: tuple[str, ...]


def _adamw(groups: Groups, settings: OptimizationSettings) -> Optimizer:
    betas = settings.adam_beta1, settings.adam_beta2
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.adam_epsilon, fused=True)


OPTIMIZERS = {"adamw": OptimizerKind(torch.optim.AdamW, _adamw, moments=("exp_avg", "exp_avg_sq"))}


def optimizer_kind(name: str) -> OptimizerKind:
    """Look an optimizer up.

    Raises:
        UserError: there is none of that name, with those that there are.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"--optimizer {name}: there is no such optimizer. Choose among {', '.join(OPTIMIZERS)}."
        )
    return OPTIMIZERS[name]


def moments_of(optimizer: Optimizer) -> tuple[str, ...]:
    """Name what an optimizer of the table keeps for each entry."""
    return next(kind.moments for kind in OPTIMIZERS.values() if type(optimizer) is kind.type)
