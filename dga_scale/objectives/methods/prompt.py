"""MLM (Prompt): only soft tokens are trained."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from dga_scale.backbone.peft.prompt import PROMPT
from dga_scale.config.settings import AT_LEAST_1, MethodSettings, Rules, TrainConfig, setting
from dga_scale.objectives.added import check_base_is_frozen, extended, train_only
from dga_scale.objectives.method import Method, MethodContext


@dataclass(frozen=True)
class PromptSettings(MethodSettings):
    """The soft tokens."""

    prompt_tokens: int = setting(
        100, "Soft tokens before every text; the model has so many positions less. Source: Lester et al."
    )

    rules: ClassVar[Rules] = {"prompt_tokens": AT_LEAST_1}


class Prompt(Method):
    """The LM loss, for the embeddings of tokens that stand before every text (arXiv 2104.08691).

    All else is frozen, the LM head too. The model handed back has the soft tokens: it loads through the Auto
    classes once ``dga_scale.backbone.extended`` is imported.
    """

    name = "prompt"
    summary = "MLM that trains soft tokens only (Lester et al., 2021)"
    Settings = PromptSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        check_base_is_frozen(config)

    def prepare(self, context: MethodContext) -> PreTrainedModel:
        model = extended(context.lm, "prompt", {"tokens": self.settings.prompt_tokens})
        train_only(model, PROMPT)
        return model
