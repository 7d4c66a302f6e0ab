"""What an objective says of itself; the training model does the rest."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor

from dga_scale.config import MethodSettings
from dga_scale.objectives.views import ModelInputs, View

LM_VIEW = View("mlm", masked=True)
"""The reading whose masked positions the LM loss is taken on; every objective has it."""


class Term(NamedTuple):
    """Something added to the LM loss: a scalar that is a mean over this rank's examples, and its weight."""

    value: Tensor
    weight: float


class Method:
    """An objective: the LM loss, and the terms that it adds on the views it asks for."""

    needs_importance: ClassVar[bool] = False
    """Whether importance is measured before training, and its protection set in the training model."""

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    def views(self) -> tuple[View, ...]:
        """Return the readings of each batch; ``LM_VIEW`` is one of them."""
        return (LM_VIEW,)

    def terms(self, hidden: Mapping[str, Tensor], inputs: ModelInputs) -> dict[str, Term]:
        """Return what is added to the LM loss, by the name it is logged under.

        Args:
            hidden: last hidden states (B, T, H) by name of view.
            inputs: the batch they come from.

        """
        return {}
