"""Helpers of the methods that add modules to a model."""

from torch import nn
from transformers import PreTrainedModel

from dga_scale.backbone.extended import ExtendedConfig, Settings, extend
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError


def extended(lm: PreTrainedModel, extension: str, settings: Settings) -> PreTrainedModel:
    """Add an extension to a model; one that has it from an earlier run stays as it is.

    Raises:
        UserError: The model has another extension, or this one with other settings.

    """
    config = lm.config
    if isinstance(config, ExtendedConfig) and config.extension == extension:
        if config.extension_settings != settings:
            raise UserError(
                f"the model has the extension {extension!r} with the settings {config.extension_settings}, "
                f"this run asks for {settings}: give the model's own, or start from one without"
            )
        return lm
    return extend(lm, extension, settings)


def train_only(model: nn.Module, part: str) -> None:
    """Freeze all parameters but those inside modules called ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name.split("."))


def check_base_is_frozen(config: TrainConfig) -> None:
    """Refuse settings that freeze a part of a model of which nothing is trained.

    Raises:
        UserError: There is such a setting; the message names it.

    """
    settings = config.optimization
    for name, given in (
        ("freeze_layers", settings.freeze_layers > 0),
        ("freeze_embeddings", settings.freeze_embeddings),
    ):
        if given:
            raise UserError(
                f"--{name} has no meaning with --method {config.method_name}, which trains nothing of the "
                "model but what it adds: leave it out"
            )
