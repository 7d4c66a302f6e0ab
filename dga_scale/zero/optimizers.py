"""The optimizers that ``--optimizer`` names: a new one is an entry here.

An entry says how the optimizer is built and what it keeps of each parameter, which checkpoints hold and plans
count. It has to step flat pieces of parameters entry by entry, as ZeRO cuts them anywhere; soft-masks on
updates look at the weights before and after a step, and work with any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from dga_scale.config.arguments import nearest
from dga_scale.config.settings import OptimizationSettings
from dga_scale.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Groups = list[dict[str, Any]]
"""Parameter groups with their ``weight_decay``, as torch optimizers take them."""


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        build: The function that makes it of parameter groups and settings, with learning rate 0: the loop
            sets it each step.
        moments: The tensors that its state holds for each entry that it steps, in fp32, by name.
        attach: The function that gets that optimizer and its engine once the engine is built, so that an
            optimizer can learn where its parameters lie; by default nothing.

    """

    build: Callable[[Groups, OptimizationSettings], Optimizer]
    moments: tuple[str, ...]
    attach: Callable[[Any, "DeepSpeedEngine"], None] = lambda *_: None


def _adamw(groups: Groups, settings: OptimizationSettings) -> Optimizer:
    betas = settings.adam_beta1, settings.adam_beta2
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.adam_epsilon, fused=True)


OPTIMIZERS = {"adamw": OptimizerKind(_adamw, moments=("exp_avg", "exp_avg_sq"))}


def optimizer_kind(name: str) -> OptimizerKind:
    """Look an optimizer up.

    Raises:
        UserError: There is none of that name, with those that there are and the nearest.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"--optimizer {name}: there is no such optimizer. Choose among {', '.join(OPTIMIZERS)}."
            + nearest(name, OPTIMIZERS)
        )
    return OPTIMIZERS[name]
