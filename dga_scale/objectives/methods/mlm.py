"""Plain masked (or causal) language modelling: DAPT, the baseline of every other objective."""

from dga_scale.config.methods.mlm import MLMSettings
from dga_scale.objectives.method import Method


class MaskedLM(Method[MLMSettings]):
    """The LM loss alone, on the one view that every method has."""

    Settings = MLMSettings
