"""What methods share that add modules to a model."""

from torch import nn

from dga_scale.config import TrainConfig
from dga_scale.errors import UserError


def train_only(model: nn.Module, part: str) -> None:
    """Freeze all parameters but those inside modules called ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name.split("."))


def check_base_is_frozen(config: TrainConfig) -> None:
    """Refuse settings that freeze a part of a model of which nothing is trained.

    Raises:
        UserError: naming the setting.

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
