"""Settings that several methods have."""

from dataclasses import dataclass

from dga_scale.config.declaration import AT_LEAST_1, setting
from dga_scale.config.settings import MethodSettings
from dga_scale.unit_kinds import UNIT_KINDS


@dataclass(frozen=True)
class ContrastSettings(MethodSettings):
    """The settings of a contrast of examples."""

    contrast_scope: str = setting(
        "micro_batch",
        "Where an example's negatives come from. micro_batch: one forward pass on all ranks; global_batch: "
        "all micro-batches of the optimizer step too, at the memory of one, for another forward pass of the "
        "contrasted views (GradCache, arXiv 2101.06983). Without gradient accumulation the two are the same.",
        ("micro_batch", "global_batch"),
    )


PROTECT = (
    "Kinds of unit whose importance is measured and which are protected: gated in the general view, masked "
    "and followed in the logs."
)
"""What ``protect`` says of itself in every method that has it; the default is the method's own."""


@dataclass(frozen=True)
class ProtectionSettings(MethodSettings):
    """How the importance of units is measured, and which soft-mask it makes."""

    protect: list[str] = setting(["heads"], PROTECT, UNIT_KINDS, source="DGA")
    soft_mask: str = setting(
        "update",
        "Where 1 - importance is applied. update: on the step the optimizer makes, which does what the "
        "papers say; gradient: the papers' formula, which Adam largely undoes; none.",
        ("update", "gradient", "none"),
        source="DGA",
    )
    importance_samples: int = setting(
        10_000,
        "Rows on which importance is measured (all of a smaller corpus).",
        rule=AT_LEAST_1,
        source="DGA",
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


@dataclass(frozen=True)
class PriorImportanceSettings(ProtectionSettings):
    """The importances of what was learnt before, which protect it."""

    # In a run over several corpora each domain's run gets what the earlier ones left: the method itself sets
    # ``measures_after``.
    prior_importance: list[str] | None = setting(
        None,
        "Files of importances measured before, of general knowledge and of the domains learnt: a unit is "
        "protected by the largest. A run over several --corpus fills it in. Default: none, a first domain, "
        "and general knowledge's importance is measured by proxy KL.",
        refers="file",
    )


@dataclass(frozen=True)
class GeneralTextSettings(MethodSettings):
    """General text, beside the text that is trained on."""

    general_corpus: str | None = setting(
        None, "Folder of general text, on which the Fisher is measured. Needed.", refers="corpus"
    )


def prior_importance_of(settings: MethodSettings) -> list[str]:
    """Return the files of importances measured before; none where a method takes none."""
    return (settings.prior_importance or []) if isinstance(settings, PriorImportanceSettings) else []


def soft_mask_of(settings: MethodSettings) -> str:
    """Return where a method masks: ``"gradient"``, ``"update"``, or ``"none"`` where it protects no units."""
    return settings.soft_mask if isinstance(settings, ProtectionSettings) else "none"
