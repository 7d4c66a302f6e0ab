"""Settings of ``--method cse``."""

from dataclasses import dataclass, replace
from typing import ClassVar

from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, AT_LEAST_1, INSIDE_0_1, setting
from dga_scale.config.settings import MethodSettings


@dataclass(frozen=True)
class CSESettings(MethodSettings):
    """The sublayers that get experts, and the clustering of the text."""

    name: ClassVar = "cse"
    summary: ClassVar = "MLM with experts for clusters of sequences in the last layers (Dong et al., 2024)"
    dense_warmup_setting: ClassVar = "cse_warmup_steps"

    cse_layers: int = setting(2, "Last layers whose sublayers get experts.", rule=AT_LEAST_1, source="CSE")
    cse_experts: str = setting(
        "both",
        "Sublayers that an expert copies.",
        ("attention", "ffn", "both"),
        source="CSE, both did best",
    )
    cse_samples: int = setting(
        10_000, "Rows of the training text, mix included, that are clustered.", rule=AT_LEAST_1
    )
    cse_alpha: float = setting(
        0.99, "Share of a centre that one sequence leaves in sublayer.", rule=INSIDE_0_1
    )
    cse_projection: int = setting(
        64, "Size of the Gaussian projection in which sequences are compared.", rule=AT_LEAST_1
    )
    cse_eps: float | None = setting(
        None,
        "DBSCAN's eps, at all sublayers. Default: for each the elbow of its k-distance curve, or where that "
        "joins everything the largest of the curve's 95% to 25% quantiles that leaves two clusters.",
        rule=ABOVE_0,
    )
    cse_min_samples: int | None = setting(
        None, "DBSCAN's min_samples. Default: max(5, 0.5% of the rows).", rule=AT_LEAST_1
    )
    cse_warmup_steps: int = setting(
        0,
        "Steps that train the dense model first, as a run of its own, before its text is clustered: for "
        "pretraining from scratch (random_init).",
        rule=AT_LEAST_0,
        source="CSE, at most 1% of training",
    )

    @property
    def dense_warmup_steps(self) -> int:
        return self.cse_warmup_steps

    def without_dense_warmup(self) -> "CSESettings":
        return replace(self, cse_warmup_steps=0)
