"""What is learnt: one file a method, one registry."""

from dga_scale.config import MethodSettings
from dga_scale.objectives.dga import DGA
from dga_scale.objectives.method import Method
from dga_scale.objectives.mlm import MaskedLM

METHODS: dict[str, type[Method]] = {"mlm": MaskedLM, "dga": DGA}
"""The names that ``--method`` takes."""


def build_method(settings: MethodSettings) -> Method:
    """Make the objective that the settings name."""
    return METHODS[settings.method](settings)
