"""What L2 and EWC ask for; what they then do is tested in preservation and engine."""

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.objectives.methods import METHODS
from dga_scale.preservation.weight_regularisation import WeightRegularisation

GIVEN = ["--ds_config", "d.json", "--model", "m", "--corpus", "c"]


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        (["--method", "mlm"], None),
        (["--method", "l2", "--l2_weight", "0.3"], WeightRegularisation(0.3)),
        (
            ["--method", "ewc", "--general_corpus", "g", "--ewc_weight", "2"],
            WeightRegularisation(2.0, 1000, True),
        ),
        (
            [
                "--method",
                "ewc",
                "--general_corpus",
                "g",
                "--fisher_normalize",
                "false",
                "--fisher_samples",
                "9",
            ],
            WeightRegularisation(0.1, 9, False),
        ),
    ],
)
def test_settings_become_a_plan(arguments: list[str], plan: WeightRegularisation | None) -> None:
    config = read_config([*GIVEN, *arguments])
    method = METHODS[config.method_name](config.method)
    method.check(config, causal=False)
    assert method.weight_regularisation() == plan


def test_ewc_needs_general_text() -> None:
    config = read_config([*GIVEN, "--method", "ewc"])
    with pytest.raises(UserError, match=r"measures on general text .*give --general_corpus FOLDER"):
        METHODS["ewc"](config.method).check(config, causal=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "l2", "--l2_weight", "-1"], "--l2_weight -1.0: must be 0 or more"),
        (["--method", "ewc", "--fisher_samples", "0"], "--fisher_samples 0: must be at least 1"),
        (["--method", "l2", "--ewc_weight", "1"], "--ewc_weight is a setting of --method ewc"),
        (["--method", "kl", "--kl_temperature", "0"], "--kl_temperature 0.0: must be above 0"),
        (["--method", "rehearsal", "--rehearsal_weight", "-2"], "--rehearsal_weight -2.0: must be 0 or more"),
    ],
)
def test_bad_settings(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config([*GIVEN, *arguments])
