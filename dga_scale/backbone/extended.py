"""Models that are no plain Hugging Face classes: any base architecture with an extension.

One wrapper serves all extensions (experts, adapters, soft prompts) and all architectures. It holds the base
model as ``base``, unchanged in its class and its parameter names, and forwards everything to it; an extension
adds modules and hooks to the base in place. So parameters are named ``base.`` + their name in the base model,
for the masked LM, the causal LM, the classifier and the bare model alike, and a classifier takes over the
trunk of an LM folder with its extension. ``save_pretrained`` and ``from_pretrained`` work as for any model,
also through ``AutoModelForMaskedLM`` and its like, once this module is imported:

>>> import dga_scale.backbone.extended
>>> AutoModelForSequenceClassification.from_pretrained("runs/cse-acl/model", num_labels=6)

Writing an extension: a function that rebuilds everything it adds from its settings alone, which are plain
JSON data and stored in ``config.json``::

    def apply(base: PreTrainedModel, anatomy: Anatomy, settings: Settings) -> Anatomy | None: ...

    register_extension("adapter", apply)        # or a line in BUILT_IN, which imports it when first needed
    model = extend(base, "adapter", {"size": 64})

- ``anatomy`` is that of the base model with its LM head; its module names hold in ``base``, whatever head
  ``base`` has (``base.get_submodule(anatomy.ffn_outputs[0])``). ``trunk_of(base)`` is the trunk; training
  calls the trunk itself, not the wrapper, so hooks belong on the trunk or on modules inside it.
- Make modules with the dtype of ``base`` and initialise them in ``apply``: transformers leaves them as they
  are. Their weights are read from the checkpoint afterwards, so random values are no harm; under
  ``from_pretrained`` they are made on the meta device, so values must not be read in ``apply``.
- Return an anatomy where it changed (soft prompts take positions away), else None. Names without ``base.``.
- Where keys and values of one pass don't hold in the next (another route, a prompt put in again), call
  ``keep_no_cache``.
- Freezing is not part of an extension: who trains sets ``requires_grad``, on ``extend``'s result.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dga_scale.backbone.anatomy import Anatomy, anatomy_of, register, trunk_of
from dga_scale.errors import UserError

Settings = dict[str, Any]
Apply = Callable[[PreTrainedModel, Anatomy, Settings], Anatomy | None]

MODEL_TYPE = "dga_extended"
PREFIX = "base."

EXTENSIONS: dict[str, Apply] = {}
"""What an extension's name stands for; filled by ``register_extension``."""

BUILT_IN = {
    "experts": "dga_scale.experts.extension",
    "adapter": "dga_scale.backbone.peft.adapters",
    "prompt": "dga_scale.backbone.peft.prompt",
}
"""Modules that register an extension when they are imported."""

_SHOWN = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "is_decoder", "use_cache", "tie_word_embeddings"),
        *(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "mask")),
    }
)
"""Settings of the base model that can be read off the wrapper's config."""


def register_extension(name: str, apply: Apply) -> None:
    """Teach the wrapper an extension by the name that its config stores. A later call for a name wins."""
    EXTENSIONS[name] = apply


class ExtendedConfig(PretrainedConfig):
    """Configuration of an extended model.

    Args:
        base: The configuration of the base model, or its dictionary with ``model_type``.
        extension: The name of what was added to it.
        extension_settings: JSON data from which the extension rebuilds what it added.

    """

    model_type = MODEL_TYPE
    # transformers passes dtype and attention implementation on to these.
    sub_configs: ClassVar[dict[str, Any]] = {"base": AutoConfig}

    def __init__(
        self,
        base: PretrainedConfig | Settings | None = None,
        extension: str = "",
        extension_settings: Settings | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = AutoConfig.for_model(**base) if isinstance(base, dict) else base
        self.extension = extension
        self.extension_settings = extension_settings or {}
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _SHOWN and (base := self.__dict__.get("base")) is not None:
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SHOWN and (base := self.__dict__.get("base")) is not None:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


class ExtendedPreTrainedModel(PreTrainedModel):
    """A base model with an extension.

    Args:
        config: The model's configuration.
        base: The base model, when its weights are at hand; built from the configuration otherwise.

    Raises:
        UserError: An unknown extension or base architecture; building one under ZeRO-3's partitioned loading,
            since extensions copy and read what is then spread over ranks. Loaded whole, DeepSpeed spreads it
            when the engine is built.

    """

    config_class = ExtendedConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the base model checks for itself what it can do
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _auto: ClassVar[Any] = None
    base: PreTrainedModel

    def __init__(self, config: ExtendedConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # Training loads such a model whole. Others may load it inside a ZeRO-3 of their own, of which
        # transformers knows (an HfDeepSpeedConfig): DeepSpeed is not asked, nor imported.
        if base is None and is_deepspeed_zero3_enabled():
            raise UserError(
                f"a model with the extension {config.extension!r} can't be loaded spread over the ranks of "
                "ZeRO-3: load it before an HfDeepSpeedConfig exists, or use ZeRO-2"
            )
        self.base = base if base is not None else self._build(config)
        config.base = self.base.config
        plain = set(self.base.modules())
        dense = _anatomy_of_base(self.base)
        changed = _extension(config.extension)(self.base, dense, config.extension_settings)
        self.anatomy = _prefixed(changed or dense)
        for module in self.base.modules() if base is not None else set(self.base.modules()) - plain:
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' flag on a module
        self.post_init()

    @classmethod
    def _build(cls, config: ExtendedConfig) -> PreTrainedModel:
        return cls._auto.from_config(config.base, dtype=torch.get_default_dtype())

    @property
    def base_model(self) -> nn.Module:
        """The base model's trunk; a call of it goes through the extension."""
        return trunk_of(self.base)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the base model; arguments and result are its own."""
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return self.base(**{name: value for name, value in named.items() if value is not None}, **kwargs)


class ExtendedForMaskedLM(ExtendedPreTrainedModel):
    """A masked LM with an extension."""

    _auto = AutoModelForMaskedLM


class ExtendedForCausalLM(ExtendedPreTrainedModel):
    """A causal LM with an extension."""

    _auto = AutoModelForCausalLM

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model, whose forward passes go through the extension.

        Raises:
            UserError: A cache, for an extension that can have none; see ``keep_no_cache``.

        """
        base: Any = self.base
        return base.generate(*args, **kwargs)


class ExtendedForSequenceClassification(ExtendedPreTrainedModel):
    """A classifier with an extension."""

    _auto = AutoModelForSequenceClassification

    @classmethod
    def _build(cls, config: ExtendedConfig) -> PreTrainedModel:
        assert config.base is not None
        config.base.id2label, config.base.label2id = config.id2label, config.label2id
        config.base.problem_type = config.problem_type
        return super()._build(config)


class ExtendedModel(ExtendedPreTrainedModel):
    """The trunk alone with an extension."""

    @classmethod
    def _build(cls, config: ExtendedConfig) -> PreTrainedModel:
        assert config.base is not None
        return _Headless(config.base)


class _Headless(PreTrainedModel):
    """The trunk under the name that models with a head hold it by, so that parameters have one name."""

    def __init__(self, config: PretrainedConfig) -> None:
        # It computes nothing itself, so it takes whatever attention the trunk takes.
        self._supports_sdpa = self._supports_flash_attn = self._supports_flex_attn = True
        super().__init__(config)
        trunk = AutoModel.from_config(config, dtype=torch.get_default_dtype())
        self.base_model_prefix = trunk.base_model_prefix
        self.add_module(trunk.base_model_prefix, trunk)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def extend(base: PreTrainedModel, extension: str, settings: Settings) -> ExtendedPreTrainedModel:
    """Wrap a model and add an extension to it in place; its weights stay, and so does its mode.

    Raises:
        UserError: An unknown extension or architecture, a model that is extended already, or one that is
            neither a masked LM nor a causal LM nor a classifier.

    """
    if isinstance(base, ExtendedPreTrainedModel):
        raise UserError(
            f"the model has the extension {base.config.extension!r} already, and a model takes one: start "
            "from a model without"
        )
    for mapping, extended in (
        (MODEL_FOR_MASKED_LM_MAPPING, ExtendedForMaskedLM),
        (MODEL_FOR_CAUSAL_LM_MAPPING, ExtendedForCausalLM),
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, ExtendedForSequenceClassification),
    ):
        if type(base.config) in mapping and type(base) is mapping[type(base.config)]:
            names = {name: getattr(base.config, name) for name in ("id2label", "label2id", "problem_type")}
            attention = base.config._attn_implementation
            config = ExtendedConfig(base.config, extension, settings, **names)
            config._attn_implementation = attention  # a new config resets its own and its base's
            config.dtype = base.config.dtype
            return extended(config, base).train(base.training)
    raise UserError(
        f"{type(base).__name__} can't be extended: load the model with AutoModelForMaskedLM, "
        "AutoModelForCausalLM or AutoModelForSequenceClassification"
    )


def keep_no_cache(base: PreTrainedModel, extension: str) -> None:
    """Have a model process its whole text in every forward pass, also in ``generate``, and refuse a cache.

    Args:
        base: The base model, which is changed.
        extension: The extension's name in the UserError that a pass with a cache raises.

    """
    base.config.use_cache = False
    if base.can_generate():
        assert base.generation_config is not None
        base.generation_config.use_cache = False
    trunk_of(base).register_forward_pre_hook(partial(_refuse_cache, extension), with_kwargs=True)


def _refuse_cache(extension: str, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(inspect.signature(trunk.forward).parameters, args, strict=False)) | kwargs
    use_cache = given.get("use_cache")
    use_cache = trunk.config.use_cache if use_cache is None else use_cache
    # A cache is known by its class: the argument's name depends on the version of transformers.
    if use_cache or any(isinstance(value, Cache) for value in given.values()):
        raise UserError(
            f"a model with {extension} keeps no keys and values from pass to pass: generate from token ids, "
            "with use_cache=False"
        )


def model_class(architecture: str) -> type[PreTrainedModel]:
    """Find a model's class by the name in its config's ``architectures``: one of transformers, or of ours."""
    found = globals().get(architecture) or getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UserError(f"config.json names the architecture {architecture!r}, which is no model known here")
    return found


def _extension(name: str) -> Apply:
    if name not in EXTENSIONS and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    if name not in EXTENSIONS:
        known = ", ".join(sorted({*EXTENSIONS, *BUILT_IN}))
        raise UserError(
            f"extension {name!r} of the model is not known here (known: {known}); import the module that "
            "registers it before loading the model"
        )
    return EXTENSIONS[name]


def _anatomy_of_base(base: PreTrainedModel) -> Anatomy:
    """Describe the base with an LM head; one without is described by an LM of its configuration."""
    config = base.config
    masked = is_masked(config)
    mapping = MODEL_FOR_MASKED_LM_MAPPING if masked else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(base) is mapping.get(type(config), None):
        return anatomy_of(base)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device("meta"):
        return anatomy_of(auto.from_config(config))


def is_masked(config: PretrainedConfig) -> bool:
    """Return whether a model of this configuration is trained as a masked LM; otherwise as a causal LM."""
    base = config.base if isinstance(config, ExtendedConfig) else config
    return type(base) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(base, "is_decoder", False)


def _prefixed(anatomy: Anatomy) -> Anatomy:
    """Rename everything in the base model to its name in the wrapper."""

    def names(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(PREFIX + name for name in names)

    return dataclasses.replace(
        anatomy,
        projections=tuple(dataclasses.replace(p, module=PREFIX + p.module) for p in anatomy.projections),
        lm_head_parameters=names(anatomy.lm_head_parameters),
        head_modules=names(anatomy.head_modules),
        relative_projections=names(anatomy.relative_projections),
        other_matrices=names(anatomy.other_matrices),
        attention_norms=names(anatomy.attention_norms),
    )


def _described(model: PreTrainedModel) -> Anatomy:
    assert isinstance(model, ExtendedPreTrainedModel)
    return model.anatomy


AutoConfig.register(MODEL_TYPE, ExtendedConfig)
AutoModel.register(ExtendedConfig, ExtendedModel)
AutoModelForMaskedLM.register(ExtendedConfig, ExtendedForMaskedLM)
AutoModelForCausalLM.register(ExtendedConfig, ExtendedForCausalLM)
AutoModelForSequenceClassification.register(ExtendedConfig, ExtendedForSequenceClassification)
register(MODEL_TYPE, _described)
