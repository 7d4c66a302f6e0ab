"""The commands ``dga-train`` and ``dga-consolidate``; launchers/ and tools/ call the same functions."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dga_scale.config.arguments import Parser
from dga_scale.config.comparison import given_paths
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig
from dga_scale.config.user_code import import_code
from dga_scale.errors import UserError, end_rank, naming_flags, run_main
from dga_scale.launch.environment import read_launch_info
from dga_scale.launch.launcher_watch import LauncherWatch
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.storage.lock import owned_output

if TYPE_CHECKING:
    from dga_scale.launch.world import Cluster


def train_command() -> NoReturn:
    """Run ``dga-train``: one rank of a training run, under any launcher."""
    run_main(_train)


def consolidate_command() -> NoReturn:
    """Run ``dga-consolidate``: export a checkpoint of a run as a Hugging Face model folder."""
    parser = Parser(prog="dga-consolidate", description="A checkpoint as a Hugging Face model folder.")
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of the run (--output_dir).")
    parser.add_argument("--step", type=int, help="Checkpoint of this step. Default: the newest complete one.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="New folder for the model.")
    parser.add_import()
    run_main(lambda: parser.run(_consolidate))


def _train() -> NoReturn:
    quiet_libraries()
    info = read_launch_info(os.environ)
    launcher = LauncherWatch(info)  # before the imports, which take longer than a launcher may live
    settings = _outcome(read_config)
    if info.world_size == 1:
        settings()
    run_main(lambda: _train_as_rank(settings, launcher), end=end_rank)


def _train_as_rank(settings: Callable[[], TrainConfig], launcher: LauncherWatch) -> int:
    # Torch's import takes a second, DeepSpeed's and transformers' more: after the flags are checked.
    from dga_scale.launch.determinism import deterministic
    from dga_scale.launch.preemption import StopRequest
    from dga_scale.launch.watchdog import Watchdog
    from dga_scale.launch.world import join_cluster

    same_bits = deterministic(_wants_same_bits(settings))
    with StopRequest(joined=False) as stop, launcher.asking(stop), same_bits, join_cluster() as cluster:
        stop.joined = True
        line = cluster.describe()
        if cluster.rank == 0:
            print(line, flush=True)
        config = cluster.run_on_all(settings)  # the YAML file may be missing on one host only
        from dga_scale.train.same_run import check_same_program
        from dga_scale.train.sequence import train_sequence

        cluster.run_on_all(lambda: import_code(config.model.import_ or []))
        check_same_program(config, cluster)
        with Watchdog(cluster, config.run.heartbeat_timeout):
            if config.model.model is None:
                config = _with_demo(config, cluster)
            with naming_flags(given_paths(config)):
                return train_sequence(config, cluster)


def _outcome(read: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Return a function that gives the settings, or raises the error of reading them, at each call."""
    try:
        config = read()
    except UserError as error:
        mistake = error

        def fail() -> TrainConfig:
            raise mistake

        return fail
    return lambda: config


def _wants_same_bits(settings: Callable[[], TrainConfig]) -> bool:
    """Return ``--deterministic``; False where settings can't be read, which all ranks hear of later."""
    try:
        return settings().run.deterministic
    except UserError:
        return False


def _with_demo(config: TrainConfig, cluster: "Cluster") -> TrainConfig:
    """Fill in the built-in demo's settings, made ready on first use, as far as ``--method`` has them."""
    from dga_scale import quickstart

    if cluster.rank == 0:
        print(
            "no --model and no --corpus: running the built-in demo. For your own data: python "
            "tools/shard_corpus.py TEXT... --tokenizer MODEL --output DIR, then --model MODEL --corpus DIR",
            flush=True,
        )
    settings = cluster.run_on_first(quickstart.defaults)
    left = config.as_dict().keys() - config.explicit
    return config.replace(**{name: value for name, value in settings.items() if name in left})


def _consolidate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from dga_scale.checkpoint.export import consolidate

    with owned_output(options.output):
        print(f"model: {consolidate(options.run, options.step, options.output)}")
    return 0
