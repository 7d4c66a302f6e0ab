"""The model that a run on a CPU starts from has the kernels made for one, what its method adds too."""

from pathlib import Path

import pytest
from torch import nn

from dga_scale.backbone.cpu_kernels import ATTENTION
from dga_scale.config.parsing import read_config
from dga_scale.launch.world import join_cluster
from dga_scale.logging.run_log import silent_log
from dga_scale.objectives.methods import build_method
from dga_scale.train.initial_model import starting_model
from dga_scale.train.inputs import check_inputs
from dga_scale.train.resume import Start
from dga_scale.train.schedule import Schedule
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments


def kernels(flags: list[str]) -> tuple[set[str], set[str]]:
    """Where the classes of dropout are defined, and the attentions in use."""
    cluster, config = join_cluster(), read_config(flags)
    inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
    start = Start(None, Schedule.of(config.optimization), config.optimization.optimizer)
    lm = starting_model(inputs, cluster, silent_log(), build_method(config), start).lm
    dropouts = {type(m).__module__ for m in lm.modules() if isinstance(m, nn.Dropout)}
    return dropouts, {m.config._attn_implementation for m in lm.modules() if hasattr(m, "config")}


@pytest.mark.parametrize("method", ["mlm", "lora"])
def test_a_run_on_a_cpu_has_the_kernels_made_for_one(method: str, world: SmallWorld, tmp_path: Path) -> None:
    added = {"lora_dropout": 0.1} if method == "lora" else {}
    flags = arguments(world, tmp_path / "run", method=method, dropout=0.1, soft_mask=None, **added)
    assert run_ranks(1, kernels, flags) == [({"dga_scale.backbone.cpu_kernels"}, {ATTENTION})]
