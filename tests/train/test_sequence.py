"""A sequence of domains: what a domain's importance does to the next, stops inside and between, refusals."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dga_scale.config.parsing import read_config
from dga_scale.corpus.cli import main as shard
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.launch.world import join_cluster
from dga_scale.train.sequence import closing_table, losses_after_each, train_sequence
from dga_scale.train.trainer import Trainer
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import DOMAIN, GENERAL, SmallWorld, make_world, write_text
from tests.helpers.stops import ask_to_stop
from tests.test_train import arguments, around_steps

NAMES = ("corpus", "general_corpus", "third")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    world = make_world(tmp_path_factory.mktemp("world"))
    text = write_text(world.corpus.parent / "third.jsonl", [*GENERAL, *DOMAIN][::-2], documents=200, seed=2)
    third = world.corpus.parent / "third"
    shared = ["--tokenizer", str(world.model), "--sequence_length", "32", "--validation_share", "0.1"]
    shard([str(text), *shared, "--output", str(third)])
    return world


def flags_of(world: SmallWorld, run: Path, **settings: Any) -> list[str]:
    values = {"method": "das", "soft_mask": "update", "max_steps": 4, "general_eval_corpus": None, **settings}
    single = [f for f in arguments(world, run, **values) if not f.startswith("--corpus")]
    return [*single, "--corpus", *(str(world.corpus.parent / name) for name in NAMES)]


def run_sequence(flags: list[str]) -> int:
    return train_sequence(read_config(flags), join_cluster())


def run_and_watch(flags: list[str], stop_in: str = "", stop_at: int = 0) -> tuple[int, dict[str, Any]]:
    """The exit code, and by domain: its protection and the factors of its update mask.

    A signal comes in step ``stop_at`` of the domain ``stop_in``.
    """
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def watched(trainer: Trainer, batches: Any) -> Iterator[None]:
        domain = trainer.inputs.corpus.path.name
        protection = trainer.protection
        factors = {n: [(f.dim, f.scale.clone()) for f in fs] for n, fs in protection.factors.items()}
        seen.setdefault(domain, (dict(protection.a), factors))
        yield
        if domain == stop_in and batches.step == stop_at:
            ask_to_stop()

    with around_steps(watched):
        return run_sequence(flags), seen


def squashed(path: Path) -> dict[str, Tensor]:
    """max(0, tanh(z-score within the layer)) of a file of importances, written out."""
    found = {}
    for kind, values in load_file(path).items():
        if kind.startswith("left_out:"):
            continue
        rows = []
        for row in values.double():
            mean = sum(row) / len(row)
            deviation = (sum((row - mean) ** 2) / len(row)) ** 0.5
            rows.append(torch.tanh((row - mean) / deviation).clamp(min=0))
        found[kind] = torch.stack(rows).float()
    return found


def test_each_domains_importance_protects_it_from_the_later_ones(world: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (code, seen), _ = run_ranks(2, run_and_watch, flags_of(world, run))
    assert code == 0
    stages = [run / f"{number}-{name}" for number, name in enumerate(NAMES, 1)]
    general = squashed(stages[0] / "importance.safetensors")
    after = [squashed(stage / "importance-after.safetensors") for stage in stages]
    assert set(general) == {"heads", "ffn_intermediate", "ffn_output"}
    for kind, a in general.items():
        first, second = torch.maximum(a, after[0][kind]), torch.maximum(a, after[0][kind])
        second = torch.maximum(second, after[1][kind])
        torch.testing.assert_close(seen["corpus"][0][kind], a, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen["general_corpus"][0][kind], first, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen["third"][0][kind], second, atol=1e-5, rtol=0)
        assert (
            second - first
        ).max() > 0.1  # what was important in the second domain changes the third's mask
    # The mask on the weights: 1 - a on the rows of the up-projection and of the down-projection.
    _, factors = seen["third"]
    layer = "bert.encoder.layer.1"
    for parameter, kind in (
        (f"{layer}.intermediate.dense", "ffn_intermediate"),
        (f"{layer}.output.dense", "ffn_output"),
    ):
        for leaf in ("weight", "bias"):
            ((dim, scale),) = factors[f"{parameter}.{leaf}"]
            assert dim == 0
            torch.testing.assert_close(scale, 1 - seen["third"][0][kind][1])

    # The third run starts from the second's model, and no optimizer state crosses over.
    settings = (stages[2] / "config.yaml").read_text()
    assert f"model: {stages[1] / 'model'}" in settings
    figures = json.loads((run / "sequence.json").read_text())
    assert figures["domains"] == list(NAMES)
    assert [value is None for value in figures["losses"]["general_corpus"]] == [True, False, False]
    assert (run / "report.html").exists()


def test_a_sequence_resumes_inside_and_between_domains(world: SmallWorld, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_ranks(2, run_sequence, flags_of(world, whole)) == [0, 0]
    for step in (1, 3):
        results = run_ranks(2, run_and_watch, flags_of(world, parts), "general_corpus", step)
        assert [code for code, _ in results] == [EXIT_STOPPED] * 2
        assert list(results[0][1]) == {1: ["corpus", "general_corpus"], 3: ["general_corpus"]}[step]
        second = parts / "2-general_corpus"
        # After the last one the stop is heard while importance for the domain is measured.
        assert (second / "checkpoints" / "step-000004").exists() == (step == 3)
        assert not (second / "importance-after.safetensors").exists()
        assert not (second / "model").exists()
        assert not (parts / "3-third" / "checkpoints").exists()
    before = (parts / "1-corpus" / "model" / "model.safetensors").stat().st_mtime_ns
    results = run_ranks(2, run_and_watch, flags_of(world, parts))
    assert [code for code, _ in results] == [0, 0]
    assert list(results[0][1]) == ["third"]  # the others were complete
    assert (parts / "1-corpus" / "model" / "model.safetensors").stat().st_mtime_ns == before
    one, other = (load_file(run / "3-third" / "model" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval_corpus": "x"}, "can't be that of 3 domains"),
        ({"resume": "x"}, "a sequence resumes from its own folder"),
        (
            {"method": "cse", "soft_mask": None, "cse_warmup_steps": 2},
            "--cse_warmup_steps 2 trains a dense model on one corpus",
        ),
    ],
)
def test_what_makes_no_sense_for_a_sequence_is_refused(
    settings: dict[str, Any], named: str, world: SmallWorld, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match=named):
        run_ranks(1, run_sequence, flags_of(world, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_another_sequence_in_the_folder_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    """The same domains in another order, for example: they would share the report."""
    earlier = tmp_path / "run" / "1-elsewhere"
    earlier.mkdir(parents=True)
    (earlier / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RankError, match="holds another sequence: 1-elsewhere is none of 1-"):
        run_ranks(1, run_sequence, flags_of(world, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1-elsewhere"]


def test_a_missing_later_corpus_is_refused_before_the_first_is_trained(
    world: SmallWorld, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="nowhere"):
        run_ranks(1, run_sequence, [*flags_of(world, tmp_path / "run"), str(tmp_path / "nowhere")])
    assert not (tmp_path / "run").exists()


def test_experts_after_a_dense_warm_up_from_random_weights(world: SmallWorld, tmp_path: Path) -> None:
    """Pretraining from scratch: a dense run first, whose model is clustered; the same command resumes."""
    run = tmp_path / "run"
    flags = arguments(
        world, run, method="cse", random_init="true", cse_warmup_steps=2, cse_samples=64, cse_projection=8,
        cse_layers=1, max_steps=4, mix=f"{world.general_corpus}:0.4", general_eval_corpus=None,
    )  # fmt: skip
    assert run_ranks(2, run_sequence, flags) == [0, 0]
    log = [json.loads(line) for line in (run / "1-dense" / "log.jsonl").read_text().splitlines()]
    first = next(record for record in log if record.get("event") == "evaluation")
    vocabulary = json.loads((world.model / "config.json").read_text())["vocab_size"]
    assert first["domain_loss"] == pytest.approx(math.log(vocabulary), rel=0.1)  # nothing is known yet
    assert sum("loss/mlm" in record for record in log) == 2
    dense = load_file(run / "1-dense" / "model" / "model.safetensors")
    experts = load_file(run / "2-experts" / "model" / "model.safetensors")
    assert len(experts) > len(dense)
    finished = (run / "2-experts" / "report.html").stat().st_mtime_ns
    assert run_ranks(2, run_sequence, flags) == [0, 0]
    assert (run / "2-experts" / "report.html").stat().st_mtime_ns == finished


def test_dry_run_of_a_sequence_writes_nothing(world: SmallWorld, tmp_path: Path) -> None:
    assert run_ranks(2, run_sequence, flags_of(world, tmp_path / "run", dry_run="true")) == [0, 0]
    assert not (tmp_path / "run").exists()


def test_losses_of_another_text_are_left_out_of_a_sequence() -> None:
    """Each domain is followed on the text of its own run, general text on that of the first."""

    def summary(**losses: tuple[str, float]) -> dict[str, Any]:
        texts = {name: {"content_hash": text, "rows": 5} for name, (text, _) in losses.items()}
        figures = {f"{name}_loss": {"before": 9.0, "after": loss} for name, (_, loss) in losses.items()}
        return {"texts": texts, **figures}

    one = summary(domain=("x", 1.0), general=("g", 2.0))
    two = summary(domain=("y", 1.5), x=("x", 1.1), general=("g", 2.1))
    assert losses_after_each([one, two], ["x", "y"]) == ({"x": [1.0, 1.1], "y": [None, 1.5]}, [9.0, 2.0, 2.1])
    two = summary(domain=("y", 1.5), x=("x, sharded again", 1.1), general=("more", 2.1))
    assert losses_after_each([one, two], ["x", "y"]) == (
        {"x": [1.0, None], "y": [None, 1.5]},
        [9.0, 2.0, None],
    )
    assert losses_after_each([summary(domain=("x", 1.0))], ["x"]) == ({"x": [1.0]}, [None, None])


def test_the_closing_table_has_general_text_where_there_is_some() -> None:
    losses = {"x": [1.0, 1.1], "y": [None, 1.5]}
    bare = closing_table(["x", "y"], losses, [None, None, None])
    assert [column.header for column in bare.columns] == ["after", "x", "y"]
    full = closing_table(["x", "y"], losses, [9.0, None, 2.1])
    assert [column.header for column in full.columns] == ["after", "x", "y", "general"]
    assert [*full.columns[1].cells] == ["1.0000", "1.1000"]
    assert [*full.columns[3].cells][1] == "2.1000"
