"""MLM (LoRA): only low-rank changes of projections are trained."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.backbone.peft.lora import inject_lora
from dga_scale.config.settings import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_1,
    MethodSettings,
    Rules,
    TrainConfig,
    setting,
)
from dga_scale.objectives.added import check_base_is_frozen
from dga_scale.objectives.method import Method, MethodContext


@dataclass(frozen=True)
class LoRASettings(MethodSettings):
    """The low-rank matrices."""

    lora_rank: int = setting(8, "Rank of the change of a projection. Source: LoRA.")
    lora_alpha: float = setting(16.0, "The change is multiplied by this over the rank. Source: LoRA.")
    lora_dropout: float = setting(0.0, "Dropout of what the low-rank matrices read.")
    lora_targets: list[str] | None = setting(
        None,
        "Projections that are changed. One that holds several of them (GPT-2's) is changed as a whole. "
        "Default: query key value output.",
        ("query", "key", "value", "output", "up", "down"),
    )

    rules: ClassVar[Rules] = {"lora_rank": AT_LEAST_1, "lora_alpha": ABOVE_0, "lora_dropout": BELOW_1}


class LoRA(Method):
    """The LM loss, for ``W + (alpha / rank) B A`` in place of each chosen projection's W (arXiv 2106.09685).

    All else is frozen, the LM head too. The model handed back is a plain one with the changes merged into its
    weights; ``adapter/`` in its folder holds them as ``peft`` loads them.
    """

    name = "lora"
    summary = "MLM that trains low-rank changes of projections only, merged at the end (Hu et al., 2021)"
    Settings = LoRASettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        check_base_is_frozen(config)

    def prepare(self, context: MethodContext) -> None:
        settings = self.settings
        inject_lora(
            context.lm,
            context.anatomy,
            roles=settings.lora_targets or ("query", "key", "value", "output"),
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            base_name=context.config.model.model,
        )
