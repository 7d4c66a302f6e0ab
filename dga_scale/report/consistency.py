"""The command ``dga-consistency``: gradient consistency of corpora, as a figure and a JSON file."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dga_scale.config.arguments import Count, Parser, PathText
from dga_scale.config.methods import known_settings
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries


def consistency_command() -> NoReturn:
    """Run ``dga-consistency``."""
    run_main(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print, by ``arguments`` (None: the command line)."""
    quiet_libraries()
    return build_parser().run(_measure, arguments)


def build_parser() -> Parser:
    """Build the parser of all options."""
    parser = Parser(
        prog="dga-consistency",
        description="How consistent the gradients of each corpus are with those of all together, for one "
        "block: text near 0 or below is a long tail that the block does not learn along with the rest.",
    )
    add = parser.add_argument
    add("--model", required=True, type=PathText, metavar="DIR", help="folder or hub name of the model")
    add("--corpus", required=True, nargs="+", type=PathText, metavar="DIR",
        help="sharded corpora, one or several")  # fmt: skip
    add("--layer", type=int, default=-1, help="block whose gradients are compared; default: -1, the last")
    add("--rows", action=Count, least=2, default=64, help="sequences of each corpus; default: 64")
    add("--mlm_probability", type=float, default=0.15, help="share of masked tokens; default: 0.15")
    add("--output", type=Path, default=Path("gradient_consistency"), metavar="DIR",
        help="where consistency.json and consistency.png go; default: gradient_consistency")  # fmt: skip
    parser.add_import()
    return parser


def _measure(options: argparse.Namespace) -> int:
    if words := known_settings()["mlm_probability"].problem(options.mlm_probability):
        raise UserError(f"--mlm_probability {options.mlm_probability}: must be {words}.")
    import torch

    # transformers' import takes seconds.
    from dga_scale.backbone.loading import load_model
    from dga_scale.corpus.shards import check_sequence_length, open_corpus
    from dga_scale.experts.consistency import consistency, corpus_gradients
    from dga_scale.logging.plots import consistency_figure, save_png
    from dga_scale.run_folder import write_text

    loaded = load_model(options.model)
    torch.nn.Module.to(loaded.model, "cuda" if torch.cuda.is_available() else "cpu")
    layer = options.layer if options.layer >= 0 else loaded.anatomy.num_layers + options.layer
    gradients = {}
    for path, name in zip(options.corpus, _names(options.corpus), strict=True):
        corpus = open_corpus(path, loaded.tokenizer)
        check_sequence_length(corpus, loaded.anatomy.max_positions)
        gradients[name] = corpus_gradients(loaded, corpus, layer, options.rows, options.mlm_probability)
    found = consistency(gradients)
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "model": options.model,
        "corpora": dict(zip(found, options.corpus, strict=True)),
        "layer": layer,
        "consistency": {name: each.as_dict() for name, each in found.items()},
    }
    write_text(options.output / "consistency.json", json.dumps(content, indent=2) + "\n")
    figure = consistency_figure({name: (each.rows, each.group) for name, each in found.items()})
    save_png(figure, options.output / "consistency.png")
    for name, each in found.items():
        print(f"{name}: consistency {each.group:.3f}, of a sequence {each.rows.mean():.3f} on average")
    print(f"results: {options.output / 'consistency.json'}, {options.output / 'consistency.png'}")
    return 0


def _names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of the paths; the whole ones where two would be the same."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
