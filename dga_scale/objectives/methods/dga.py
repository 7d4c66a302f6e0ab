"""DGA: adapting a language model while preserving its general knowledge (Ke et al., EMNLP 2022)."""

from dga_scale.config.methods.dga import DGASettings
from dga_scale.objectives.contrast import Contrast, Side
from dga_scale.objectives.method import LM_VIEW, Method
from dga_scale.objectives.views import View
from dga_scale.unit_kinds import in_table_order


class DGA(Method[DGASettings]):
    """The LM loss, and a contrast of full knowledge with general knowledge.

    Two ungated views of the clean text, apart by their dropout draws, are the positive pair; the view
    whose units are gated by their protection, and all other examples, are the negatives. A weight of 0 leaves
    those views out.

    With ``contrast_views shared`` the masked view is the anchor. As a key it could be told from the gated
    views by its gaps; this way all keys are of clean text, and what tells an example's positive from its
    negative are the gates alone, as in the paper.
    """

    Settings = DGASettings

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of ``--protect``; heads, as in the paper, by default."""
        return in_table_order(self.settings.protect)

    def contrast(self) -> Contrast | None:
        settings = self.settings
        if settings.contrastive_weight == 0:
            return None
        full = View("full")
        pair = (LM_VIEW, full) if settings.contrast_views == "shared" else (full, View("full_plus"))
        return Contrast(
            name="contrastive",
            weight=settings.contrastive_weight,
            temperature=settings.temperature,
            scope=settings.contrast_scope,
            sides=[Side(view) for view in (*pair, View("general", gated=True))],
        )
