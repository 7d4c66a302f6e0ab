"""Settings of methods that measure the importance of units and protect them."""

from dataclasses import dataclass
from typing import ClassVar

from dga_scale.config.settings import AT_LEAST_1, MethodSettings, Rules, setting


@dataclass(frozen=True)
class ProtectionSettings(MethodSettings):
    """Importance, and the soft-mask it makes."""

    soft_mask: str = setting(
        "gradient",
        "Where 1 - importance is applied. gradient: the papers' formula, which Adam largely undoes; "
        "update: on the step the optimizer makes, which does what the papers say; none. Source: DGA.",
        ("gradient", "update", "none"),
    )
    importance_samples: int = setting(
        10_000, "Rows on which importance is measured (all of a smaller corpus). Source: DGA."
    )
    importance_distribution: str = setting(
        "vocabulary",
        "What the proxy KL compares: softmax over the vocabulary at sampled positions, over the hidden axis, "
        "or over positions (the released code).",
        ("vocabulary", "hidden", "sequence"),
    )
    importance_squash: str = setting(
        "clip",
        "How negative values of tanh(z-score) become a protection: clip to 0, abs (the released code), "
        "or minmax within the layer.",
        ("clip", "abs", "minmax"),
    )
    kv_protection: str = setting(
        "min",
        "Protection of a key/value head that query heads share: of the least, most or mean protected.",
        ("min", "max", "mean"),
    )

    rules: ClassVar[Rules] = {"importance_samples": AT_LEAST_1}
