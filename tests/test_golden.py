"""Golden numbers: every loss term, grad norm and learning rate of six steps of each method, as recorded.

``tests/golden/CASE.json`` holds what the whole program logged on two ranks (gloo, fp32) under ZeRO-2 and
ZeRO-3, and the machine that it was recorded on. Where this machine is like it (same libraries, CPU and
threads), the numbers have to be equal to the last bit, and the test's id ends in ``-exact``. Elsewhere other
kernels add up in another order: there they may differ as ``may_differ`` says, and the id ends in ``-close``.

A change that moves no number must leave the files alone. One that is meant to move some renews them, and
says in its commit which and why::

    RENEW_GOLDEN=1 python -m pytest tests/test_golden.py -n 0              all cases
    RENEW_GOLDEN=1 python -m pytest tests/test_golden.py -n 0 -k das       one of them
"""

import json
import os
import platform
import random
import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForMaskedLM

from dga_scale.corpus.cli import main as shard
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import run_training

pytestmark = pytest.mark.slow

GOLDEN = REPOSITORY / "tests" / "golden"
RENEW = bool(os.environ.get("RENEW_GOLDEN"))
STAGES = ("zero2", "zero3")
STEPS = 6
FLAGS = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.34,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "dropout": 0.1,
    "seed": 42,
    "bf16": "false",
    "max_eval_samples": 16,
    "logging_steps": 1,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "protection_steps": STEPS,
}
"""Of every run; said here, so that another default moves no number."""
MASKS = {"importance_samples": 32, "contrastive_weight": 1.0, "temperature": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "mlm": {"method": "mlm"},
    "mlm-packed": {"method": "mlm", "corpus": "DOCUMENTS", "gradient_accumulation_steps": 2},
    "dga-gradient": {"method": "dga", "soft_mask": "gradient", **MASKS},
    "dga-update": {"method": "dga", "soft_mask": "update", **MASKS},
    "dga-packed": {"method": "dga", "soft_mask": "update", "corpus": "DOCUMENTS", **MASKS},
    "das": {
        "method": "das",
        "soft_mask": "update",
        "contrast_views": "shared",
        "contrast_scope": "global_batch",
        "gradient_accumulation_steps": 2,
        **MASKS,
    },
    "kd": {"method": "kd"},
    "kl": {"method": "kl", "mix": "GENERAL:0.3", "kl_mlm_weight": 0.5},
    "ewc": {"method": "ewc", "general_corpus": "GENERAL", "fisher_samples": 16, "ewc_weight": 5.0},
    "rehearsal": {
        "method": "rehearsal",
        "mix": "GENERAL:0.3",
        "rehearsal_weight": 0.5,
        "gradient_accumulation_steps": 2,
    },
    "lora": {"method": "lora"},
    "cse": {
        "method": "cse",
        "mix": "GENERAL:0.3",
        "cse_samples": 64,
        "cse_projection": 8,
        "cse_layers": 1,
        "cse_eps": 0.38,  # its default is the distance of two sequences, which rounding puts on either side
    },
    "simcse": {"method": "simcse"},
}
"""Flags of each case; GENERAL and DOCUMENTS stand for the folders of corpora."""

Numbers = dict[str, list[float]]
"""By name, the values of a run's steps in their order; of evaluations, those before and after."""


class Inputs(NamedTuple):
    """Folders of the model and of the corpora; ``documents`` has a document a row, which are packed."""

    model: Path
    corpus: Path
    general: Path
    documents: Path


# --- where this file meets the program -------------------------------------------------------------------


def run(flags: list[str], folder: Path) -> None:
    """Train on two ranks, as the command line ``flags`` says; the run's files lie in ``folder`` then."""
    assert run_ranks(2, run_training, [*flags, f"--output_dir={folder}"]) == [0, 0]


def logged(folder: Path) -> Numbers:
    """What is compared of a run's log."""
    numbers: Numbers = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if "event" not in record and (key.startswith("loss/") or key in ("grad_norm", "learning_rate")):
                numbers.setdefault(key, []).append(value)
            elif record.get("event") == "evaluation" and key.endswith("_loss"):
                numbers.setdefault(f"evaluation/{key}", []).append(value)
    return numbers


# --- the same text and weights everywhere ----------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Weights are drawn by Python: what transformers draws depends on versions and on the CPU."""
    folder = tmp_path_factory.mktemp("golden")
    model, draw = AutoModelForMaskedLM.from_pretrained(world.model), random.Random(0)
    for name, parameter in sorted(model.named_parameters()):
        values = [draw.uniform(-0.2, 0.2) for _ in range(parameter.numel())]
        mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = torch.tensor(values).view(parameter.shape) + mean
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((world.model / name).read_bytes())
    shard([str(world.domain_text), "--tokenizer", str(world.model), "--sequence_length", "64", "--packing",
           "document", "--validation_share", "0.1", "--num_workers", "1",
           "--output", str(folder / "documents")])  # fmt: skip
    return Inputs(folder / "model", world.corpus, world.general_corpus, folder / "documents")


def flags_of(case: str, stage: str, inputs: Inputs) -> list[str]:
    config = REPOSITORY / "ds_configs" / f"{stage}.json"
    settings = FLAGS | {"ds_config": config, "model": inputs.model, "corpus": inputs.corpus} | CASES[case]
    folders = {"GENERAL": str(inputs.general), "DOCUMENTS": str(inputs.documents)}
    return [
        f"--{name}={re.sub('|'.join(folders), lambda found: folders[found[0]], str(value))}"
        for name, value in settings.items()
    ]


# --- recorded and compared -------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the last bits depend on. Ranks of tests compute with one thread."""
    about = dict.fromkeys(("model name", "flags", "Features"), "")
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in about:
            about[key.strip()] = value.strip()
    features = f"{about['flags']} {about['Features']}".split()
    vector = [name for name in features if re.match("avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm", name)]
    libraries = ("torch", "numpy", "deepspeed", "transformers", "peft")
    return {
        "cpu": f"{platform.machine()} {about['model name']}".strip(),
        "features": " ".join(sorted(vector)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        **{name: metadata.version(name) for name in libraries},
    }


def read(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{case}.json").read_text())
    return found


def write(case: str, runs: dict[str, Numbers]) -> None:
    """A name and its values a line; floats as ``repr`` writes them, which is exact."""

    def block(entries: dict[str, Any]) -> str:
        lines = (f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
        return "{\n" + ",\n".join(lines) + "\n  }"

    blocks = {"machine": machine(), **runs}
    text = ",\n".join(f"  {json.dumps(name)}: {block(entries)}" for name, entries in blocks.items())
    (GOLDEN / f"{case}.json").write_text("{\n" + text + "\n}\n")


def how(case: str) -> str:
    """How the numbers of a case are compared here, for the test's id."""
    if RENEW or not (GOLDEN / f"{case}.json").exists():
        return "renew"
    return "exact" if read(case)["machine"] == machine() else "close"


def may_differ(name: str, golden: float) -> float:
    """How far a number may lie from the one recorded on a machine that is not like this one.

    Measured on one CPU with kernels for SSE in place of those for AVX-512: up to 5e-7 of a value, and 2e-7 in
    divergences, which are small differences of large logits. A schedule is plain arithmetic.
    """
    return 0.0 if name == "learning_rate" else 1e-5 * abs(golden) + 1e-6


def apart(golden: Numbers, numbers: Numbers, exact: bool) -> list[str]:
    """What differs and by how much; first what differed first."""
    found = [(0, f"{name} is logged now") for name in numbers.keys() - golden.keys()]
    found += [(0, f"{name} is not logged any more") for name in golden.keys() - numbers.keys()]
    for name in golden.keys() & numbers.keys():
        if len(golden[name]) != len(numbers[name]):
            found.append((0, f"{name} has {len(numbers[name])} values, not {len(golden[name])}"))
            continue
        for at, (old, new) in enumerate(zip(golden[name], numbers[name], strict=True), start=1):
            if not abs(new - old) <= (0.0 if exact else may_differ(name, old)):  # nor where it is NaN
                found.append((at, f"value {at} of {name}: {new!r}, not {old!r} (by {new - old:.1e})"))
    return [line for _, line in sorted(found)]


@pytest.mark.parametrize(("case", "how"), [(case, how(case)) for case in CASES])
def test_numbers_are_those_recorded(case: str, how: str, inputs: Inputs, tmp_path: Path) -> None:
    runs = {}
    for stage in STAGES:
        run(flags_of(case, stage, inputs), tmp_path / stage)
        runs[stage] = logged(tmp_path / stage)
        assert len(runs[stage]["loss/total"]) == STEPS
    if how == "renew":
        if not RENEW:
            pytest.fail(f"{case} has no recording: see the top of this file")
        write(case, runs)
        pytest.skip(f"recorded {case}")
    golden = read(case)
    found = [
        f"{stage}: {line}" for stage in STAGES for line in apart(golden[stage], runs[stage], how == "exact")
    ]
    assert not found, "\n".join(found)
