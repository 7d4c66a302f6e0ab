"""The command ``dga-plan``; tools/plan.py calls the same function."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from dga_scale.config.arguments import Count, Parser, refusing_wrong_paths
from dga_scale.config.comparison import given_paths
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig
from dga_scale.config.user_code import import_code
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries


def plan_command() -> NoReturn:
    """Entry point of ``dga-plan``."""
    run_main(main, prints_result=True)


def build_parser() -> Parser:
    """The plan's own options; all others are those of training."""
    parser = Parser(
        prog="dga-plan",
        usage="dga-plan --model MODEL --gpus N --gpu h100 --ds_config FILE.json [settings of dga-train]",
        description="What a run needs before it is paid for: memory of a rank, traffic and time of a step, "
        "what does not fit, and what would. On paper: no weights are read, no GPU is needed.",
        epilog="Every setting of dga-train is understood, --config FILE.yaml too: --method, "
        "--global_batch_size, --max_steps, --bf16, --gradient_checkpointing, --split_views, ... --model is a "
        "name, a folder or a config.json. No --corpus is needed.",
    )
    add = parser.add_argument
    add("--gpus", action=Count, required=True, help="GPUs of the run, one rank on each")
    add("--gpus_per_node", action=Count, default=8, help="GPUs in one machine; default: 8")
    add("--gpu", required=True, metavar="NAME|FILE.yaml", help="h100, h200, a100, a100-40gb, or a YAML file")
    add("--mfu", type=float, metavar="SHARE", help="of forward and backward passes, as measured "
        "(mfu in a log); default: a roofline of the GPU's figures")  # fmt: skip
    add("--sequence_length", type=int, help="tokens a row; default: 512, or what the model takes if less")
    add("--scaling", action="store_true", help="also 1 to 1,024 GPUs with the configured rows a rank")
    add("--json", action="store_true", help="print JSON, in bytes and seconds, instead of tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan as ``arguments`` (None: the command line) say; exit code 1 if it does not fit as configured."""
    quiet_libraries()
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser.refuse_doubled_flags(words)
    options, settings = parser.parse_known_args(words)
    if not any(word.split("=", 1)[0] == "--corpus" for word in settings):
        # It is not looked at, but training's parser wants one beside a model.
        settings += ["--corpus", "any"]
    config = read_config(settings, also=parser.flags())
    with refusing_wrong_paths(given_paths(config)):
        import_code(config.model.import_ or [])
        return _plan(options, config)


def _plan(options: argparse.Namespace, config: TrainConfig) -> int:
    from dga_scale.planning.gpus import find_gpu  # this import and those below take seconds

    gpu = find_gpu(options.gpu)
    if options.mfu is not None:
        if not 0 < options.mfu <= 1:
            raise UserError(f"--mfu {options.mfu}: must be a share above 0, at most 1")
        gpu = dataclasses.replace(gpu, mfu=options.mfu)
    from dga_scale.planning.plan import Cluster, make_planner
    from dga_scale.planning.report import as_json, print_plan, print_scaling, scaling_as_json
    from dga_scale.zero.ds_keys import load_ds_config

    raw = load_ds_config(config.run.ds_config or "")
    cluster = Cluster(options.gpus, options.gpus_per_node, gpu)
    planner = make_planner(config, raw, cluster, options.sequence_length)
    plan, recommended = planner.as_configured(), planner.recommended()
    if options.json:
        found = as_json(planner, plan, recommended)
        if options.scaling:
            found["scaling"] = scaling_as_json(planner)
        print(json.dumps(found, indent=2))
    else:
        print_plan(planner, plan, recommended)
        if options.scaling:
            print_scaling(planner)
    return 0 if plan.fits else 1
