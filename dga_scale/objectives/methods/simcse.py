"""MLM + SimCSE: two dropout draws of a sentence are drawn together, all others pushed away."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from dga_scale.backbone.loading import has_dropout
from dga_scale.config.settings import ABOVE_0, AT_LEAST_0, Rules, setting
from dga_scale.errors import UserError
from dga_scale.objectives.contrast import Contrast, ContrastSettings, Side
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.objectives.views import View


@dataclass(frozen=True)
class SimCSESettings(ContrastSettings):
    """The contrast of sentences."""

    simcse_weight: float = setting(1.0, "Weight of the contrast. Source: DGA's baseline.")
    simcse_temperature: float = setting(0.05, "Temperature of the contrast. Source: SimCSE.")

    rules: ClassVar[Rules] = {"simcse_weight": AT_LEAST_0, "simcse_temperature": ABOVE_0}


class SimCSE(Method):
    """The LM loss, and InfoNCE of two readings of the clean text that differ by their dropout draws.

    States are pooled over the real tokens; the negatives of a sentence are the second readings of all others,
    of all ranks (arXiv 2104.08821).
    """

    name = "simcse"
    summary = "MLM + contrast of two dropout draws of a sentence with all others (Gao et al., 2021)"
    Settings = SimCSESettings

    def prepare(self, context: MethodContext) -> PreTrainedModel | None:
        """Refuse a model without dropout.

        Raises:
            UserError: two readings of a sentence would be the same.

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
