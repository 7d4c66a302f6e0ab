"""MLM + SimCSE: two dropout draws of a sentence are drawn together, all others pushed away."""

from transformers import PreTrainedModel

from dga_scale.backbone.loading import has_dropout
from dga_scale.config.methods.simcse import SimCSESettings
from dga_scale.errors import UserError
from dga_scale.objectives.contrast import Contrast, Side
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.objectives.views import View


class SimCSE(Method[SimCSESettings]):
    """The LM loss, and InfoNCE of two views of the clean text that differ by their dropout draws.

    States are pooled over the real tokens; the negatives of a sentence are the second views of all others,
    of all ranks (arXiv 2104.08821).
    """

    Settings = SimCSESettings

    def prepare(self, context: MethodContext) -> PreTrainedModel | None:
        """Refuse a model without dropout.

        Raises:
            UserError: The model has no dropout: two views of a sentence would be the same.

        """
        if not has_dropout(context.lm.config):
            raise UserError(
                "--method simcse contrasts two dropout draws, and this model has no dropout: give it some "
                "with --dropout 0.1"
            )
        return None

    def contrast(self) -> Contrast:
        return Contrast(
            name="simcse",
            weight=self.settings.simcse_weight,
            temperature=self.settings.simcse_temperature,
            scope=self.settings.contrast_scope,
            sides=[Side(View("first")), Side(View("second"))],
        )
