"""The command ``dga-extend-vocabulary``; tools/extend_vocabulary.py calls the same function."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dga_scale.config.arguments import Parser, PathText
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.storage.lock import owned_output
from dga_scale.vocabulary.terms import Term, read_terms

_NAMED = 5
"""The most terms that a line names of those that are left out."""


def extend_vocabulary_command() -> NoReturn:
    """Entry point of ``dga-extend-vocabulary``."""
    run_main(main)


def build_parser() -> Parser:
    """Build the parser of the command's options."""
    parser = Parser(
        prog="dga-extend-vocabulary",
        description="Give a domain's terms tokens of their own: writes a model's folder with the terms in "
        "its tokenizer and a row for each in its embeddings, the mean of the rows of the tokens that the "
        "term had before. Shard the text and train with this folder: the rows are trained as all others.",
    )
    add = parser.add_argument
    add("--model", required=True, type=PathText, metavar="DIR", help="the model: folder or hub name")
    add("--terms", required=True, type=Path, metavar="FILE", help="text file with a term a line")
    add("--output", required=True, type=Path, metavar="DIR", help="new folder for the model with these terms")
    parser.add_import()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Extend a vocabulary as given in ``arguments`` (None: the command line)."""
    quiet_libraries()
    return build_parser().run(_extend, arguments)


def _extend(options: argparse.Namespace) -> int:
    if options.output.exists():
        raise UserError("it exists already. Give a new folder, or remove it.", options.output)
    terms = read_terms(options.terms)
    from dga_scale.merging.folders import ModelFolder  # transformers' import takes seconds
    from dga_scale.vocabulary.extend import extend

    with owned_output(options.output):
        done = extend(ModelFolder.open(options.model), terms, options.output)
    if done.left_out:
        print(f"left out, one token already: {_named(done.left_out)}")
    mean = sum(len(each.pieces) for each in done.added) / len(done.added)
    print(
        f"added: {len(done.added)} terms, which were {mean:.1f} tokens each on average; {done.tokens} tokens "
        f"now, {done.rows} rows in the embeddings"
    )
    print(f"model: {options.output} (shard the text anew: --tokenizer {options.output})")
    return 0


def _named(terms: Sequence[Term]) -> str:
    named = ", ".join(f"{each.text} (line {each.line})" for each in terms[:_NAMED])
    return named + (f" and {len(terms) - _NAMED} more" if len(terms) > _NAMED else "")
