"""MLM (Adapter): only bottleneck adapters are trained."""

from transformers import PreTrainedModel

from dga_scale.backbone.peft.adapters import ADAPTER
from dga_scale.config.methods.adapter import AdapterSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.objectives.added import check_base_is_frozen, extended, train_only
from dga_scale.objectives.method import Method, MethodContext


class Adapter(Method[AdapterSettings]):
    """The LM loss, for adapters behind the attention and the FFN output of each layer (arXiv 1902.00751).

    All else is frozen, the LM head too. The exported model has the adapters: it loads through the Auto
    classes once ``dga_scale.backbone.extended`` is imported.
    """

    Settings = AdapterSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        check_base_is_frozen(config)

    def prepare(self, context: MethodContext) -> PreTrainedModel:
        settings = {"size": self.settings.adapter_size, "activation": self.settings.adapter_activation}
        model = extended(context.lm, "adapter", settings)
        train_only(model, ADAPTER)
        return model
