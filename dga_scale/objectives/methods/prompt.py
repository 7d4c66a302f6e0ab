"""MLM (Prompt): only soft tokens are trained."""

from transformers import PreTrainedModel

from dga_scale.backbone.peft.prompt import PROMPT
from dga_scale.config.methods.prompt import PromptSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.tokenizer import positions_beside
from dga_scale.errors import UserError
from dga_scale.objectives.added import check_base_is_frozen, extended, train_only
from dga_scale.objectives.method import Method, MethodContext


class Prompt(Method[PromptSettings]):
    """The LM loss, for the embeddings of tokens that stand before every text (arXiv 2104.08691).

    All else is frozen, the LM head too. The exported model has the soft tokens: it loads through the Auto
    classes once ``dga_scale.backbone.extended`` is imported.
    """

    Settings = PromptSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        check_base_is_frozen(config)
        positions, tokens = positions_beside(config.model.model or ""), self.settings.prompt_tokens
        if positions is not None and tokens >= positions:
            raise UserError(
                f"--prompt_tokens {tokens}: the model has {positions} positions, which leaves none for text. "
                "Set fewer"
            )

    def prepare(self, context: MethodContext) -> PreTrainedModel:
        model = extended(context.lm, "prompt", {"tokens": self.settings.prompt_tokens})
        train_only(model, PROMPT)
        return model
