"""The whole program on real ranks: what a run writes, how it stops and resumes, and what it refuses."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from dga_scale.config.parsing import read_config
from dga_scale.corpus.cli import main as shard_corpus
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.launch.world import Cluster, join_cluster
from dga_scale.logging.run_log import RunLog
from dga_scale.preservation.importance import Importance
from dga_scale.train.loop import train
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import local_fragments
from dga_scale.zero.shards import refresh_model_weights
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY, RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.helpers.stops import ask_to_stop

STEPS = 6


def arguments(world: SmallWorld, run: Path, **settings: Any) -> list[str]:
    """Flags of a short run; fp32, so that resumed runs can be compared bit for bit."""
    values = {
        "ds_config": REPOSITORY / "ds_configs" / "zero2.json",
        "model": world.model,
        "corpus": world.corpus,
        "general_eval_corpus": world.general_corpus / "validation",
        "output_dir": run,
        "max_steps": STEPS,
        "global_batch_size": 16,
        "learning_rate": 1e-3,
        "importance_samples": 64,
        "max_eval_samples": 32,
        "save_steps": 2,
        "eval_steps": 3,
        "protection_steps": 2,
        "save_total_limit": 0,
        "bf16": "false",
        **settings,
    }
    if settings.get("method", "dga") not in ("dga", "das"):
        del values["importance_samples"]
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def run_training(flags: list[str]) -> int:
    with no_pictures():
        return run_and_draw(flags)


def run_and_draw(flags: list[str]) -> int:
    return train(read_config(flags), join_cluster())


@contextlib.contextmanager
def around_steps(around: Callable[[Trainer, Any], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, every training step of this process runs inside ``around(trainer, batches)``."""
    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        with around(self, batches):
            return original(self, batches)

    Trainer.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.step = original  # type: ignore[method-assign]


def run_until(flags: list[str], step: int, rank: int) -> int:
    """Rank ``rank`` gets SIGTERM while step ``step`` is computed."""

    @contextlib.contextmanager
    def signalled(trainer: Trainer, batches: Any) -> Iterator[None]:
        if batches.step == step and trainer.cluster.rank == rank:
            ask_to_stop()
        yield

    with around_steps(signalled):
        return run_training(flags)


def run_stopped_while_measuring(flags: list[str], name: str) -> int:
    """Rank 1 gets SIGTERM at the second batch of what is measured under this name."""
    original, rank = RunLog.track, join_cluster().rank

    def track(self: RunLog, items: Any, total: int, what: str) -> Iterator[Any]:
        for number, item in enumerate(original(self, items, total, what)):
            if what == name and number == 1 and rank == 1:
                ask_to_stop()
            assert what != name or number < 3, "the stop was not heard"
            yield item

    RunLog.track = track  # type: ignore[method-assign]
    try:
        return run_training(flags)
    finally:
        RunLog.track = original  # type: ignore[method-assign]


def run_into_nan(flags: list[str], step: int) -> int:
    """From ``step`` on, rank 1's embeddings give NaN."""

    @contextlib.contextmanager
    def poisoned(trainer: Trainer, batches: Any) -> Iterator[None]:
        if batches.step < step or trainer.cluster.rank != 1:
            yield
            return
        embeddings = trainer.model.lm.base_model.embeddings
        handle = embeddings.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        yield
        handle.remove()

    with around_steps(poisoned):
        return run_training(flags)


def run_with_a_spoilt_weight(flags: list[str], step: int) -> int:
    """After ``step`` a weight turns into NaNs."""

    @contextlib.contextmanager
    def spoilt(trainer: Trainer, batches: Any) -> Iterator[None]:
        yield
        if batches.step == step:
            for fragment in local_fragments(trainer.engine):
                if fragment.name.endswith("layer.1.output.dense.weight"):
                    fragment.values.fill_(torch.nan)
            refresh_model_weights(trainer.engine)

    with around_steps(spoilt):
        return run_training(flags)


def run_and_listen(flags: list[str]) -> str:
    """What rank 0 prints during a run."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_training(flags)
    return printed.getvalue()


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["loss/total"] for record in records if "loss/total" in record]


@pytest.fixture(scope="module")
def finished(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under ZeRO-2, ended."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert run_ranks(2, run_and_draw, arguments(world, run, soft_mask="update")) == [0, 0]
    return run


def test_a_run_leaves_all_that_it_promises(finished: Path, world: SmallWorld):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "environment.json", "log.jsonl", "tensorboard", "importance.safetensors",
                     "checkpoints", "model", "report.html", "summary.json",
                     "importance-heads.png"}  # fmt: skip
    assert (finished / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:06d}"
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert {"loss/total", "loss/mlm", "loss/contrastive", "grad_norm", "learning_rate", "tokens_per_second",
            "data_wait_seconds", "step_seconds", "memory_gib", "mfu"} <= steps[0].keys()  # fmt: skip
    assert len(steps[0]["memory_gib"]) == 2
    evaluated = [record["step"] for record in records if record.get("event") == "evaluation"]
    assert evaluated == [0, 3, 6]
    assert {"domain_loss", "general_loss"} <= next(
        r for r in records if r.get("event") == "evaluation"
    ).keys()
    protections = [record for record in records if record.get("event") == "protection"]
    assert [record["step"] for record in protections] == [2, 4, 6]
    assert list((finished / "tensorboard").glob("events*"))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["domain_loss"]["after"] < summary["domain_loss"]["before"]
    steps = [record for record in records if "event" not in record]
    assert len(steps) == STEPS
    assert summary["tokens"] == round(sum(s["tokens_per_second"] * s["step_seconds"] for s in steps))


def test_update_masks_hold_what_they_ask_for(finished: Path):
    """Each step is 1 - a of the optimizer's; so is movement, to the noise of heads whose own steps differ.

    That noise grows with the steps, which cancel in one head more than in another: it is looked at early.
    """
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    protections = [record for record in records if record.get("event") == "protection"]
    asked, moved = torch.tensor(protections[0]["one_minus_a"]), torch.tensor(protections[0]["movement"])
    assert (asked < 0.9).any()
    for record in protections:
        assert record["applied_over_proposed"] == pytest.approx(asked.mean().item(), abs=1e-5)
    torch.testing.assert_close(moved, asked, atol=0.15, rtol=0.0)


def test_the_model_loads_and_has_learnt(finished: Path, world: SmallWorld):
    model = AutoModelForMaskedLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    base = AutoModelForMaskedLM.from_pretrained(world.model)
    assert len(tokenizer) == model.config.vocab_size
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert min(moved) > 0


def test_a_finished_run_says_so_and_changes_nothing(finished: Path, world: SmallWorld):
    before = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}
    assert run_ranks(2, run_and_draw, arguments(world, finished, soft_mask="update")) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")} == before
    assert len(losses(finished)) == STEPS


@pytest.mark.parametrize("damage", ["flipped", "emptied"])
def test_a_damaged_model_of_a_finished_run_is_exported_again(
    damage: str, finished: Path, world: SmallWorld, tmp_path: Path
):
    run = shutil.copytree(finished, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    expected = weights.read_bytes()
    if damage == "flipped":
        weights.write_bytes(expected[:-9] + bytes([expected[-9] ^ 1]) + expected[-8:])
    else:
        for path in (run / "model").iterdir():
            path.unlink()
    printed, _ = run_ranks(2, run_and_listen, arguments(world, run, soft_mask="update"))
    assert "model.safetensors is not what was exported: the model is exported again" in printed
    assert weights.read_bytes() == expected
    assert (run / "model" / "config.json").exists()


def test_a_finished_run_without_checkpoints_is_not_trained_anew(
    finished: Path, world: SmallWorld, tmp_path: Path
):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    printed, _ = run_ranks(2, run_and_listen, arguments(world, run, soft_mask="update"))
    assert "is finished; its checkpoints were removed" in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = refusal(arguments(world, run, soft_mask="update", max_steps=STEPS + 1))
    assert f"holds a finished run of {STEPS} steps whose checkpoints" in said
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_training, arguments(world, run, soft_mask="update"))
    texts = [text for _, text in caught.value.errors.values()]
    assert any(f"holds a finished run of {STEPS} steps whose checkpoints" in text for text in texts)


def test_a_run_whose_settings_are_gone_and_a_corpus_without_its_held_out_part(
    finished: Path, world: SmallWorld, tmp_path: Path
):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.yaml").unlink()
    said = refusal(arguments(world, run, soft_mask="update"))
    assert (
        f"holds a run whose config.yaml is gone. Restore that, or go on in a new folder: --resume {run}"
        in said
    )
    corpus = shutil.copytree(world.corpus, tmp_path / "corpus")
    shutil.rmtree(corpus / "validation")
    said = refusal(arguments(world, tmp_path / "new", corpus=corpus))
    assert f"{corpus}: its held-out part is gone: validation/. Copy it again" in said


def test_a_finished_run_that_lost_its_log_keeps_its_summary(
    finished: Path, world: SmallWorld, tmp_path: Path
):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "log.jsonl").unlink()
    printed, _ = run_ranks(2, run_and_listen, arguments(world, run, soft_mask="update"))
    assert "log.jsonl has no steps any more: summary and report stay as they were" in printed
    for name in ("summary.json", "report.html"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_and_the_run_resumes_bit_for_bit(
    finished: Path, world: SmallWorld, tmp_path: Path, rank: int
):
    flags = arguments(world, tmp_path / "run", soft_mask="update")
    assert run_ranks(2, run_until, flags, 2, rank) == [EXIT_STOPPED, EXIT_STOPPED]
    stopped = losses(tmp_path / "run")
    assert stopped == losses(finished)[: len(stopped)]
    assert 3 <= len(stopped) <= 4  # within one step of the signal
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.parametrize(("name", "method"), [("importance", "dga"), ("Fisher", "ewc")])
def test_a_signal_is_heard_between_the_batches_of_a_measurement(
    name: str, method: str, world: SmallWorld, tmp_path: Path
):
    own = {"general_corpus": world.general_corpus, "fisher_samples": 12} if method == "ewc" else {}
    own |= {"method": method, "max_steps": 2, "dropout": 0.1}
    flags = arguments(world, tmp_path / "run", **own)
    assert run_ranks(2, run_stopped_while_measuring, flags, name) == [EXIT_STOPPED, EXIT_STOPPED]
    assert not list((tmp_path / "run").glob("importance*")) + list((tmp_path / "run").glob("fisher"))
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert run_ranks(2, run_training, arguments(world, tmp_path / "whole", **own)) == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_resumes_on_another_number_of_ranks(world: SmallWorld, tmp_path: Path):
    """Without dropout the losses are those of the run on two ranks, to the order of sums in fp32."""
    still = {"dropout": 0.0, "method": "mlm"}
    run_ranks(2, run_training, arguments(world, tmp_path / "two", **still))
    flags = arguments(world, tmp_path / "changing", **still)
    assert run_ranks(2, run_until, flags, 1, 0) == [EXIT_STOPPED, EXIT_STOPPED]
    assert run_ranks(1, run_training, flags) == [0]
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "two"), abs=2e-5)
    # The exported model is set up as the one that was given, whatever the run needed.
    saved = BertConfig.from_pretrained(tmp_path / "two" / "model")
    assert saved.hidden_dropout_prob == BertConfig.from_pretrained(world.model).hidden_dropout_prob == 0.1


@pytest.mark.parametrize("method", ["mlm", "kl"])
def test_a_source_without_a_row_in_a_step_has_no_loss_there(method: str, world: SmallWorld, tmp_path: Path):
    """Two rows a step, of which one in ten is general text: most steps have none."""
    mix = f"{world.general_corpus}:0.1"
    flags = arguments(world, tmp_path / "run", method=method, mix=mix, global_batch_size=2, max_steps=12)
    assert run_ranks(2, run_training, flags) == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]
    general = [r["loss/mlm/general_corpus"] for r in steps if "loss/mlm/general_corpus" in r]
    assert 0 < len(general) < len(steps) == 12
    if method == "kl":
        assert [s["step"] for s in steps if "loss/kl" in s] == [
            s["step"] for s in steps if "loss/mlm/general_corpus" in s
        ]
    assert all(3 < loss < 9 for loss in general)
    domain = [record["loss/mlm/corpus"] for record in steps if "loss/mlm/corpus" in record]
    assert all(3 < loss < 9 for loss in domain)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == round(sum(s["tokens_per_second"] * s["step_seconds"] for s in steps))


def test_gradient_masks_come_with_a_word_about_adam_once(world: SmallWorld, tmp_path: Path):
    flags = arguments(world, tmp_path / "run", soft_mask="gradient", max_steps=2)
    first, second = run_ranks(2, run_and_listen, flags)
    assert first.count("--soft_mask update") == 1
    assert "step 2/2" in first
    assert second == ""
    error = Importance.load(tmp_path / "run" / "importance.safetensors").standard_errors()["heads"][1].max()
    line = f"importance of 64 rows: largest standard error of a {error.item():.2f} (heads)"
    assert line in " ".join(first.split())
    assert ("other rows would protect" in first) == (error.item() > 0.1)


@pytest.mark.parametrize("stage", ["zero0", "zero3", "zero3_offload"])
def test_other_zero_stages_compute_the_same(finished: Path, world: SmallWorld, tmp_path: Path, stage: str):
    """ZeRO-3 loads the model spread over the ranks from the start; sums are ordered otherwise, no more."""
    config = REPOSITORY / "ds_configs" / f"{stage}.json"
    flags = arguments(world, tmp_path / "run", soft_mask="update", ds_config=config)
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), abs=2e-5)


def test_dry_run_writes_nothing(world: SmallWorld, tmp_path: Path):
    assert run_ranks(2, run_training, [*arguments(world, tmp_path / "dry"), "--dry_run"]) == [0, 0]
    assert not (tmp_path / "dry").exists()


def test_importance_is_read_again_and_inspectable(finished: Path):
    importance = Importance.load(finished / "importance.safetensors")
    assert importance.values["heads"].shape == (2, 4)
    assert importance.settings["examples"] == 64
    assert (finished / "importance-heads.png").read_bytes().startswith(b"\x89PNG")


# --- what is refused, before any weights are read --------------------------------------------------------


def refusal(flags: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        train(read_config(flags), single())
    return str(caught.value)


def single() -> Cluster:
    return Cluster(
        "python", rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu")
    )


def test_another_run_in_the_folder(finished: Path, world: SmallWorld):
    text = refusal(arguments(world, finished, soft_mask="update", learning_rate=2e-3))
    assert "holds another run" in text
    assert "learning_rate was 0.001, is 0.002" in text


def test_a_run_of_an_older_version_whose_corpus_has_moved_resumes(
    finished: Path, world: SmallWorld, tmp_path: Path
):
    run = shutil.copytree(finished, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("layer_lr_decay", "contrast_scope", "max_bad_steps"):  # as if they had come since
        del settings[name]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    before = (run / "log.jsonl").read_text()
    moved = shutil.copytree(world.corpus, tmp_path / "elsewhere")
    flags = arguments(world, run, soft_mask="update", model=f"{world.model}/", corpus=moved)
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert losses(run) == losses(finished)
    assert (run / "log.jsonl").read_text().startswith(before)
    assert yaml.safe_load((run / "config.yaml").read_text())["layer_lr_decay"] == 1.0


def test_a_folder_with_other_files(world: SmallWorld, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refusal(arguments(world, tmp_path))


def test_resume_never_in_a_folder_with_checkpoints(finished: Path, world: SmallWorld):
    text = refusal(arguments(world, finished, soft_mask="update", resume="never"))
    assert "resume" in text
    assert "step-000006" in text


def test_a_missing_corpus_and_one_of_another_tokenizer(world: SmallWorld, tmp_path: Path):
    assert str(tmp_path / "none") in refusal(arguments(world, tmp_path / "r", corpus=tmp_path / "none"))
    other = tmp_path / "other"
    shutil.copytree(world.model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in refusal(arguments(world, tmp_path / "r", model=other))


def test_batches_that_do_not_divide_and_a_corpus_too_small(world: SmallWorld, tmp_path: Path):
    text = refusal(arguments(world, tmp_path / "r", per_device_train_batch_size=5))
    assert "16" in text
    assert "5" in text
    assert "fewer than one global batch of 100000" in refusal(
        arguments(world, tmp_path / "r", global_batch_size=100_000)
    )


def test_a_ds_config_that_contradicts_a_flag(world: SmallWorld, tmp_path: Path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 32, "zero_optimization": {"stage": 1}}))
    assert "train_batch_size" in refusal(arguments(world, tmp_path / "r", ds_config=config))
    config.write_text(json.dumps({"zero_optimisation": {"stage": 1}}))
    assert "zero_optimization" in refusal(arguments(world, tmp_path / "r", ds_config=config))


def test_a_corpus_longer_than_the_model(world: SmallWorld, tmp_path: Path):
    short = tmp_path / "short"
    shutil.copytree(world.model, short)
    config = BertConfig.from_pretrained(world.model, max_position_embeddings=16)
    BertForMaskedLM(config).save_pretrained(short)
    text = refusal(arguments(world, tmp_path / "r", model=short))
    assert "32" in text
    assert "16" in text


def test_held_out_text_longer_than_the_model(world: SmallWorld, tmp_path: Path):
    AutoTokenizer.from_pretrained(world.model).save_pretrained(tmp_path / "tokenizer")  # without the model
    words = [str(world.general_text), "--tokenizer", str(tmp_path / "tokenizer")]
    words += ["--output", str(tmp_path / "long")]
    shard_corpus([*words, "--sequence_length", "96", "--num_workers", "1"])
    text = refusal(arguments(world, tmp_path / "r", general_eval_corpus=tmp_path / "long"))
    assert "long: it has rows of 96 tokens, the model takes at most 64" in text


def test_a_model_without_a_head_and_no_warm_up(world: SmallWorld, tmp_path: Path):
    headless = tmp_path / "headless"
    shutil.copytree(world.model, headless)
    BertModel.from_pretrained(world.model).save_pretrained(headless)
    assert "--head_warmup_steps" in refusal(arguments(world, tmp_path / "r", model=headless))


def test_a_warmed_up_head_trains_on(world: SmallWorld, tmp_path: Path):
    headless = tmp_path / "headless"
    shutil.copytree(world.model, headless)
    BertModel.from_pretrained(world.model).save_pretrained(headless)
    flags = arguments(world, tmp_path / "r", model=headless, head_warmup_steps=20, max_steps=2)
    assert run_ranks(2, run_training, flags) == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "evaluation"
    AutoModelForMaskedLM.from_pretrained(tmp_path / "r" / "model")


def test_a_model_without_dropout_is_refused_on_every_rank(world: SmallWorld, tmp_path: Path):
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_training, arguments(world, tmp_path / "r", dropout=0.0))
    assert {name for name, _ in caught.value.errors.values()} == {"UserError"}
    assert all("--dropout 0.1" in text for _, text in caught.value.errors.values())


def test_a_flipped_byte_in_a_shard(world: SmallWorld, tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(world.corpus, damaged)
    shard = next(path for path in sorted(damaged.rglob("*.arrow")) if "validation" not in str(path))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    text = refusal(arguments(world, tmp_path / "r", corpus=damaged))
    assert shard.name in text


def test_steps_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    world: SmallWorld, tmp_path: Path
):
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_into_nan, arguments(world, tmp_path / "r", max_bad_steps=3), 2)
    assert {name for name, _ in caught.value.errors.values()} == {"UserError"}
    # Saved between refused steps, which leave the weights as they were: good, and the newest.
    assert all("step-000004" in text for _, text in caught.value.errors.values())
    assert all("All weights are finite" in text for _, text in caught.value.errors.values())


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_evaluation_that_is_not_finite_stops_the_run_and_names_the_weight(
    stage: str, world: SmallWorld, tmp_path: Path
):
    flags = arguments(
        world, tmp_path / "r", method="mlm", ds_config=REPOSITORY / "ds_configs" / f"{stage}.json"
    )
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_with_a_spoilt_weight, flags, 2)
    said = r"after step 3: domain_loss is nan.* The weight bert\.\S*layer\.1\.output\.dense\.weight holds one"
    assert len(caught.value.errors) == 2
    assert all(re.search(said, text) for _, text in caught.value.errors.values())
    assert not (tmp_path / "r" / "summary.json").exists()
