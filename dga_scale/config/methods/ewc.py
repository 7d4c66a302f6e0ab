"""Settings of ``--method ewc``."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.declaration import AT_LEAST_0, AT_LEAST_1, setting
from dga_scale.config.methods.shared import GeneralTextSettings


@dataclass(frozen=True)
class EWCSettings(GeneralTextSettings):
    """The penalty, and the Fisher that weighs it."""

    name: ClassVar = "ewc"
    summary: ClassVar = (
        "MLM + elastic weight consolidation: weights regularised by the Fisher of general text"
    )

    ewc_weight: float = setting(
        0.1,
        "Lambda of the penalty (lambda / 2) * sum of F * squared distance from the starting weights. It "
        "depends on the scale of F: see fisher_normalize. The penalty's gradient is added after clipping: it "
        "weighs more beside a gradient that was clipped.",
        rule=AT_LEAST_0,
    )
    fisher_samples: int = setting(
        1000, "Rows of general text that the Fisher is measured on.", rule=AT_LEAST_1
    )
    fisher_normalize: bool = setting(
        True, "Scale the Fisher to mean 1 over all weights, so that ewc_weight compares with l2_weight."
    )
