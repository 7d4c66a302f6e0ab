"""EWC: the LM loss, and a pull on each weight by what general text needs of it (Kirkpatrick et al., 2017)."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import AT_LEAST_0, AT_LEAST_1, MethodSettings, Rules, TrainConfig, setting
from dga_scale.errors import UserError
from dga_scale.objectives.method import Method
from dga_scale.preservation.anchors import AnchorPlan


@dataclass(frozen=True)
class EWCSettings(MethodSettings):
    """The pull, and what it is measured on."""

    ewc_weight: float = setting(
        0.1,
        "lambda of the penalty (lambda / 2) * sum of F * squared distance from the starting weights. It "
        "depends on the scale of F: see fisher_normalize.",
    )
    general_corpus: str | None = setting(
        None, "Folder of general text, on which the Fisher is measured. Needed."
    )
    fisher_samples: int = setting(1000, "Rows of general text that the Fisher is measured on.")
    fisher_normalize: bool = setting(
        True, "Scale the Fisher to mean 1 over all weights, so that ewc_weight compares with l2_weight."
    )

    rules: ClassVar[Rules] = {"ewc_weight": AT_LEAST_0, "fisher_samples": AT_LEAST_1}


class EWC(Method):
    """``L_MLM + (lambda / 2) sum_i F_i (theta_i - theta0_i)^2``, theta0 the starting weights.

    F is the diagonal empirical Fisher of the MLM loss on general text: the mean of squared gradients of
    single examples, without dropout. Measured once, before training, and kept in the run's folder.
    """

    name = "ewc"
    summary = "MLM + elastic weight consolidation: a pull by the Fisher of general text"
    Settings = EWCSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        if self.settings.general_corpus is None:
            raise UserError(
                "--method ewc measures on general text which weights to keep: give --general_corpus FOLDER, "
                "a corpus that tools/shard_corpus.py wrote"
            )

    def anchor(self) -> AnchorPlan:
        settings = self.settings
        return AnchorPlan(settings.ewc_weight, settings.fisher_samples, settings.fisher_normalize)
