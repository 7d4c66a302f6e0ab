"""Plain masked (or causal) language modelling: DAPT, the baseline of every other objective."""

from dga_scale.objectives.method import Method


class MaskedLM(Method):
    """The LM loss alone, on the one view that every method has."""

    name = "mlm"
    summary = "plain masked (or causal) LM: DAPT, domain-adaptive pre-training"
