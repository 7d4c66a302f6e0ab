"""Shared by the benchmarks: models and corpora made from DATA, commands, tables, and the file of results."""

import argparse
import importlib
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import RobertaConfig

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "benchmarks"
"""The folder for models, corpora and runs."""
SECTIONS = WORK / "sections.md"
"""The file of new results, newest last, from which they are moved to RESULTS.md by hand."""
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")
SEQUENCE_LENGTH = 128
SHAPES = ("minilm", "roberta-base")
TEXTS = {"packed": ("acl", "chunk"), "reviews": ("restaurant", "document")}
"""The corpus and packing of each text. A review is a row of its own, mostly far shorter than 128 tokens."""
WARM_UP = 3
"""The number of steps that are not counted, in which kernels are chosen and buffers allocated."""


def options_of(
    description: str | None,
    *,
    data: bool = True,
    choices: Mapping[str, Iterable[str]] | None = None,
    **defaults: Any,
) -> argparse.Namespace:
    """Read the command line, which has an option for each of ``defaults``, and DATA if ``data`` is true.

    An option is of its default's type: a list takes several values (numbers if empty), ``False`` is a switch.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data:
        words = "folder with corpora/NAME.jsonl.gz, endtasks/NAME and models/minilm-l6-mlm"
        parser.add_argument("data", type=Path, metavar="DATA", help=words)
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
            continue
        several = isinstance(default, list)
        parser.add_argument(
            f"--{name}",
            type=(type(default[0]) if default else float) if several else type(default),
            nargs="+" if several else None,
            default=default,
            choices=(choices or {}).get(name),
            help="default: %(default)s",
        )
    return parser.parse_args()


def model_of(data: Path, shape: str, layers: int = 12) -> Path:
    """Return the folder of the pretrained MiniLM, or of a random model of RoBERTa-base's shape."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    small = data.resolve() / "models" / "minilm-l6-mlm"
    if shape == "minilm":
        return small
    model = WORK / f"{shape}-{layers}"
    if not (model / "tokenizer.json").exists():  # saved last
        tokenizer = AutoTokenizer.from_pretrained(small)
        ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id}
        config = roberta_base(layers, **{f"{name}_token_id": number for name, number in ids.items()})
        AutoModelForMaskedLM.from_config(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    return model


def roberta_base(layers: int = 12, **settings: Any) -> "RobertaConfig":
    """Return the configuration of RoBERTa-base, or of a part of its layers."""
    from transformers import RobertaConfig

    sizes: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return RobertaConfig(num_hidden_layers=layers, **sizes, **settings)


def corpus_of(
    data: Path,
    name: str = "acl",
    packing: str = "chunk",
    *,
    validation_share: float = 0.02,
    sequence_length: int = SEQUENCE_LENGTH,
) -> Path:
    """Return the folder of a corpus of rows of at most 128 tokens, which is made if it does not exist."""
    corpus = WORK / f"{name}-{packing}-{sequence_length}"
    run("tools/shard_corpus.py", data.resolve() / "corpora" / f"{name}.jsonl.gz", "--tokenizer",
        model_of(data, "minilm"), "--output", corpus, "--sequence_length", sequence_length,
        "--packing", packing, "--validation_share", validation_share)  # fmt: skip
    return corpus


def run(*command: Any, codes: Sequence[int] = (0,)) -> str:
    """Run Python on ``command`` in the repository, one thread a process, and return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in codes:
        sys.exit(f"{shlex.join(map(str, command))} failed with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def launch(ranks: int, program: str, *arguments: Any) -> str:
    """Run a script, or a module by its dotted name, on ``ranks`` ranks, and return its output."""
    from tests.helpers.ranks import free_port  # other runs may use the launcher's usual one

    module = () if program.endswith(".py") else ("--module", "--no_local_rank")
    return run("-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", free_port(), *module,
               program, *arguments)  # fmt: skip


def train(ranks: int, output: Path, steps: int, *flags: Any, program: str = "launchers/dga_train.py") -> None:
    """Train in a new ``output`` under ZeRO-2, with no save or evaluation before the last step."""
    shutil.rmtree(output, ignore_errors=True)
    launch(ranks, program, "--ds_config", "ds_configs/zero2.json", "--output_dir", output,
           "--max_steps", steps, "--save_steps", steps, "--eval_steps", steps, *flags)  # fmt: skip


def settled_steps(output: Path) -> list[dict[str, Any]]:
    """Return what a run logged of its steps after the first three, or of the last one."""
    from dga_scale.logging.json_lines import read_log

    steps = [record for record in read_log(output / "log.jsonl") if "step_seconds" in record]
    return steps[min(WARM_UP, len(steps) - 1) :]


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of the benchmark on new gloo ranks on this machine's CPUs, and return its results.

    Arguments and results are pickled: a class of the module that was started must not be among the first.
    """
    from tests.helpers.ranks import close_pools, run_ranks

    # The ranks can't import the module by the name that it has where it was started.
    function = getattr(importlib.import_module(_started()), function.__name__)
    try:
        return run_ranks(ranks, function, *arguments, timeout=7200.0)
    finally:
        close_pools()


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Format the median of values, with their range where there are several."""
    values = list(values)
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low} to {high})" if len(values) > 1 else median


def percent(values: Iterable[float]) -> str:
    """Format the median of shares, with their range where there are several."""
    return f"{spread(100 * value for value in values)}%"


def ratios(values: Iterable[float], others: Iterable[float]) -> list[float]:
    """Return the ratio of each value to the other value of its round."""
    return [a / b for a, b in zip(values, others, strict=True)]


def met_or_missed(met: bool) -> str:
    """Return the word for a target that is met or missed."""
    return "met" if met else "missed"


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Format a table in Markdown; the first row is its header."""
    head, *rest = [list(map(str, row)) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rest)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def keep_section(title: str, body: str, path: Path = SECTIONS) -> None:
    """Print ``body`` (Markdown), and append it to ``path`` with machine, versions and this command."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    command = shlex.join(["python", "-m", _started(), *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(f"### {title}\n\n{date.today()}, {machine}, {versions}.\n\n    {command}\n\n{body}\n\n")
    print(f"{body}\n\nkept in {path}", flush=True)


def _started() -> str:
    """Return the name of the module that was started with ``python -m``."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "start benchmarks with python -m benchmarks.NAME"
    return spec.name.removesuffix(".__main__")
