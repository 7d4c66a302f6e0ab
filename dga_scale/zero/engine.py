"""The DeepSpeed engine: built from a resolved configuration, its learning rate set, its norm read."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dga_scale.launch.world import COLLECTIVE_TIMEOUT
from dga_scale.zero.ds_config import ResolvedConfig
from dga_scale.zero.optimizer_hooks import local_fragments
from dga_scale.zero.optimizers import optimizer_kind
from dga_scale.zero.patches import import_muon_uncompiled, no_shared_memory_reduce, patch_engine
from dga_scale.zero.shards import LANGUAGE_MODEL_PREFIX, keep_frozen_weights, shape_of

Engine = DeepSpeedEngine
"""The engine's type, by which other packages call it."""


def connect_deepspeed() -> None:
    """Let DeepSpeed communicate through the process group that torch has; at its second call, do nothing."""
    if not deepspeed.comm.is_initialized():
        with no_shared_memory_reduce():
            deepspeed.init_distributed(
                dist_backend=torch.distributed.get_backend(),
                auto_mpi_discovery=False,
                timeout=COLLECTIVE_TIMEOUT,
                verbose=False,
            )


@contextlib.contextmanager
def partitioned_loading(resolved: ResolvedConfig) -> Iterator[None]:
    """Within, under ZeRO-3, ``from_pretrained`` spreads the weights over the ranks as it reads them.

    No rank then ever holds the whole model. In bf16 the fp32 masters start from the rounded weights.
    """
    if resolved.zero_stage < 3:
        yield
        return
    connect_deepspeed()  # zero.Init would do it by itself, unpatched
    # transformers finds it by a weak reference: it counts as long as this name holds it.
    config = HfDeepSpeedConfig(resolved.ds_config)
    try:
        yield
    finally:
        del config
        unset_hf_deepspeed_config()


def build_engine(
    model: nn.Module, resolved: ResolvedConfig, lr_scales: Mapping[str, float] | None = None
) -> DeepSpeedEngine:
    """Build the engine of a model with fp32 weights on the CPU, or partitioned by ``zero.Init``.

    Hooks on parameters (the gradient mask) have to be registered before. Weight decay is on matrices only,
    as in transformers' Trainer: no biases, no norms. The optimizer's learning rate is 0 until
    ``set_learning_rate``, which multiplies it with ``lr_scales``, by name in the Hugging Face model; 1 for
    parameters not in there.
    """
    settings = resolved.config.optimization
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = _groups(model, settings.weight_decay, lr_scales or {})
    kind = optimizer_kind(settings.optimizer)
    optimizer = kind.build(groups, settings)
    connect_deepspeed()
    import_muon_uncompiled()
    # References, not copies: DeepSpeed's cast to 16 bits would otherwise be the last of these numbers.
    originals = {name: p.data for name, p in model.named_parameters() if not hasattr(p, "ds_id")}
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=trained,
            config=resolved.ds_config,
            dist_init_required=False,
        )
    patch_engine(engine)
    if resolved.precision != "fp32":
        _restore_masters(engine, originals)
        keep_frozen_weights(engine, originals)
    kind.attach(optimizer, engine)
    return engine


def _groups(model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: one for each learning rate and weight decay that there is."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if len(shape_of(parameter)) > 1 else 0.0
            scale = lr_scales.get(name.removeprefix(LANGUAGE_MODEL_PREFIX), 1.0)
            groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


@torch.no_grad()
def _restore_masters(engine: DeepSpeedEngine, originals: dict[str, torch.Tensor]) -> None:
    """Start the masters from the model's fp32 weights: DeepSpeed starts them from their 16-bit rounding."""
    by_name = {name.removeprefix(LANGUAGE_MODEL_PREFIX): tensor for name, tensor in originals.items()}
    for fragment in local_fragments(engine):
        if fragment.name in by_name:
            source = by_name[fragment.name].reshape(-1)
            fragment.values.copy_(source[fragment.start : fragment.start + fragment.values.numel()])


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of the next optimizer step."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def global_grad_norm(engine: DeepSpeedEngine) -> float | Tensor:
    """Return the last step's gradient norm over all parameters and ranks, before clipping; inf if refused.

    It is a scalar on the device where it still lies there: reading it would wait for the device.
    """
    norm: Any = engine.get_global_grad_norm()
    return norm.reshape(()) if isinstance(norm, Tensor) else float(norm)
