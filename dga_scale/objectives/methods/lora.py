"""MLM (LoRA): only low-rank changes of projections are trained."""

from dga_scale.backbone.peft.lora import inject_lora
from dga_scale.config.methods.lora import LoRASettings
from dga_scale.config.settings import TrainConfig
from dga_scale.objectives.added import check_base_is_frozen
from dga_scale.objectives.method import Method, MethodContext


class LoRA(Method[LoRASettings]):
    """The LM loss, for ``W + (alpha / rank) B A`` in place of each chosen projection's W (arXiv 2106.09685).

    All else is frozen, the LM head too. The exported model is a plain one with the changes merged into its
    weights; ``adapter/`` in its folder holds them as ``peft`` loads them.
    """

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
