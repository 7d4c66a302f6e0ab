"""Build the model of a plan: its real class on the meta device, from a preset, folder, config or the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig

from dga_scale.backbone.anatomy import Anatomy, ParameterSlice, anatomy_of, check_known
from dga_scale.backbone.checks import check_config, unloadable
from dga_scale.backbone.extended import is_masked
from dga_scale.backbone.flops import ModelFlops, model_flops
from dga_scale.backbone.layers import EMBEDDINGS, freeze, parameter_layers
from dga_scale.backbone.loading import has_dropout, load_model_config, set_dropout
from dga_scale.backbone.peft.prompt import PROMPT
from dga_scale.config.arguments import nearest
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.mixture import parse_mix
from dga_scale.errors import UserError
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.objectives.methods import build_method
from dga_scale.storage.checked_json import load_object
from dga_scale.unit_kinds import unit_kind

_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_XL = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 10240}
_XXL = {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 16384}

PRESETS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", "vocab_size": 30522, **_BASE},
    "roberta-base": {"model_type": "roberta", "vocab_size": 50265, **_ROBERTA, **_BASE},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50265, **_ROBERTA, **_LARGE},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **_ROBERTA, **_BASE},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "vocab_size": 250002, **_ROBERTA, **_LARGE},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_ROBERTA, **_XL},
    "xlm-roberta-xxl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_ROBERTA, **_XXL},
    "modernbert-base": {"model_type": "modernbert"},  # transformers' defaults are its sizes
    "modernbert-large": {
        "model_type": "modernbert",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 2624,
    },
    "llama-70b": {  # Llama 3
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "max_position_embeddings": 8192,
    },
}
"""The content of the published config.json of common models, since the hub may be out of reach."""


@dataclass(frozen=True)
class PlannedModel:
    """The properties of a model that a plan needs, counted on its real modules.

    Attributes:
        name: The name as given.
        anatomy: The anatomy of the model.
        method: The method of the run.
        sizes: The number of entries of each parameter, by name; tied ones once.
        trained: The names of the parameters that the optimizer steps.
        flops: The FLOPs of the model's passes.
        mixed: The share of the text that is mixed in.
        decayed: The names of the matrices among them, which have a group of their own with weight decay.
        trained_layers: The number of blocks from the lowest one with a gradient up: they keep activations.
            ALBERT's count as often as they are called.
        checkpoints: Whether activations can be recomputed.
        kv_size: The width of the keys, and of the values, in a layer.
        fused_rotary: Whether queries and keys that share a projection with the values are rotated.
        gated: Whether the FFN multiplies its up projection by an activated gate.
        fp32_norms: Whether the norms compute in float32 outside a fused kernel (RMSNorm).
        dropout: Whether a block has dropout.
        owned: The number of entries in rows that belong to one unit alone.
        masked: The number of entries of all parameters that masks scale.
    """

    name: str
    anatomy: Anatomy
    method: Method[Any]
    sizes: Mapping[str, int]
    trained: frozenset[str]
    flops: ModelFlops
    mixed: float
    decayed: frozenset[str]
    trained_layers: int
    checkpoints: bool
    kv_size: int
    fused_rotary: bool
    gated: bool
    fp32_norms: bool
    dropout: bool
    owned: int
    masked: int

    @property
    def parameters(self) -> int:
        """The number of entries of all parameters."""
        return sum(self.sizes.values())

    @property
    def trained_parameters(self) -> int:
        """The number of entries of the parameters that the optimizer steps."""
        return sum(self.sizes[name] for name in self.trained)

    @property
    def tied(self) -> bool:
        """Whether the LM head and the embeddings share a matrix."""
        table = self.anatomy.vocab_size * self.anatomy.hidden_size
        return sum(size >= table for size in self.sizes.values()) == 1

    @property
    def largest(self) -> int:
        """The number of entries of the largest parameter."""
        return max(self.sizes.values())


def find_config(name: str) -> PretrainedConfig:
    """Read the config of a model: a CONFIG.json, a folder, a preset, or a name on the hub, in this order.

    Raises:
        UserError: The file does not exist, the config can't be read, the architecture is unknown, or the name
            is neither a preset nor available from the hub.
    """
    path = Path(name)
    if path.suffix == ".json":
        return _from_file(path)
    preset = PRESETS.get(name.rsplit("/", 1)[-1].lower())
    if preset and not path.is_dir():
        values = dict(preset)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return load_model_config(name).config
    except UserError as error:
        hint = nearest(name, PRESETS)
        raise UserError(
            f"{error.problem}. Sizes known without the hub: {', '.join(PRESETS)}.{hint} A config.json is "
            "enough too",
            name,
        ) from None


def _from_file(path: Path) -> PretrainedConfig:
    try:
        values = load_object(path)
        model_type = values.pop("model_type", None)
        if not isinstance(model_type, str):
            raise UserError("no model_type in it. Give the config.json of a model", path)
        config = AutoConfig.for_model(model_type, **values)
    except OSError as error:
        raise UserError(f"{error.strerror}. Give the config.json of a model", path) from None
    except UserError:
        raise
    except Exception as error:  # whatever a class of transformers says to a value
        reason = " ".join(str(error).split())
        raise UserError(f"no config of a model: {reason}", path) from None
    check_known(config)
    check_config(config, str(path))
    return config


def build_model(config: TrainConfig) -> PlannedModel:
    """Build a run's model without its weights, changed and frozen as the run would.

    Raises:
        UserError: As ``find_config``; a method whose model depends on the training text.

    """
    name = config.model.model or ""
    sizes = find_config(name)
    if config.model.dropout is not None:
        set_dropout(sizes, config.model.dropout)
    auto = AutoModelForMaskedLM if is_masked(sizes) else AutoModelForCausalLM
    method = build_method(config)
    if method.needs_whole_model:
        raise UserError(
            f"--method {method.name}: how large its model becomes depends on the text. Plan --method mlm for "
            "the dense model, and measure with dga-train --dry_run true"
        )
    with torch.device("meta"):
        try:
            model = auto.from_config(sizes)
        except Exception as error:  # as above
            raise unloadable(name, error) from error
        anatomy = anatomy_of(model)
        freeze(model, anatomy, config.optimization.freeze_layers, config.optimization.freeze_embeddings)
        method.check(config, anatomy.causal)
        changed = method.prepare(_context(model, anatomy, config))
    if changed is not None:
        model, anatomy = changed, anatomy_of(changed)
    mixed = sum(parse_mix(spec)[1] for spec in config.data.mix or ())
    return _describe(name, model, anatomy, method, mixed)


def _context(model: Any, anatomy: Anatomy, config: TrainConfig) -> MethodContext:
    """Build the context for methods that add modules; none of its functions may be called."""

    def nothing(*_: Any) -> Any:
        raise AssertionError("a plan computes nothing")

    return MethodContext(
        lm=model,
        anatomy=anatomy,
        config=config,
        folder=Path(),
        resuming=False,
        device=torch.device("meta"),
        sample=nothing,
        sum=nothing,
        all_gather_object=nothing,
        run_on_first=nothing,
        print=nothing,
    )


def _describe(name: str, model: Any, anatomy: Anatomy, method: Method[Any], mixed: float) -> PlannedModel:
    parameters = dict(model.named_parameters())
    sizes = {key: parameter.numel() for key, parameter in parameters.items()}
    trained = frozenset(key for key, parameter in parameters.items() if parameter.requires_grad)
    first = model.get_submodule(_block_of(anatomy.attention_outputs[0], 0))
    masked = list(anatomy.slices(method.kinds))
    own = [part for part in masked if part.role == unit_kind(part.kind).own_rows]

    def entries(part: ParameterSlice) -> int:
        """Of the lines that belong to units: a fused projection has others too."""
        return int((part.unit_index >= 0).any(dim=1).sum()) * sizes[part.parameter] // len(part.unit_index)

    keys = {projection.module for projection in anatomy.projections if projection.role == "key"}
    queries = {projection.module for projection in anatomy.projections if projection.role == "query"}
    depths = parameter_layers(model, anatomy)
    # Soft tokens stand below all blocks, in a module of their own.
    lowest = [EMBEDDINGS if PROMPT in key.split(".") else depths[key] for key in trained]
    return PlannedModel(
        name=name,
        anatomy=anatomy,
        method=method,
        sizes=sizes,
        trained=trained,
        flops=model_flops(model, anatomy),
        mixed=mixed,
        decayed=frozenset(key for key in trained if parameters[key].dim() > 1),
        trained_layers=(anatomy.num_layers + 1 - max(1, min(lowest))) * anatomy.layer_uses,
        checkpoints=getattr(model, "base", model).supports_gradient_checkpointing,
        kv_size=anatomy.width("key"),
        fused_rotary=bool(keys & queries) and any("Rotary" in type(m).__name__ for m in model.modules()),
        gated=_is_gated(anatomy),
        fp32_norms=any("RMSNorm" in type(module).__name__ for module in first.modules()),
        dropout=has_dropout(model.config),
        owned=sum(map(entries, own)),
        masked=sum(map(entries, masked)),
    )


def _block_of(module: str, layer: int) -> str:
    """Return the name of the block of a module in layer ``layer``, up to and including the layer's number."""
    names = module.split(".")
    return ".".join(names[: names.index(str(layer)) + 1])


def _is_gated(anatomy: Anatomy) -> bool:
    """Whether a gate goes up beside the units, in a projection of its own or stacked on theirs."""
    ups = (part for part in anatomy.projections if part.layer == 0 and part.role == "up")
    return sum(len(part.outputs.numbers) for part in ups) >= 2 * anatomy.intermediate_size
