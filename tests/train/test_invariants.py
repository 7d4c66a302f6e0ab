"""Run-time invariants: silent on sound runs in every ZeRO stage, and each one seen to fail on real ranks."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.streams import BatchStream
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster
from dga_scale.logging.run_log import open_log
from dga_scale.train.inputs import check_inputs
from dga_scale.train.invariants import Invariants, _incomplete
from dga_scale.train.protection import protect
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import local_fragments
from tests.helpers.ranks import REPOSITORY, RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, around_steps, losses, run_training

WORD = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
Fault = Callable[[Trainer], Callable[[], Any]]
"""Breaks something on the rank that calls it; returns what fixes it."""


def changed(tensor: Tensor, place: int = 0) -> Callable[[], Any]:
    """Add 1 to an entry; returns what takes it back."""
    flat = tensor.detach().view(-1)
    before = flat[place].clone()
    flat[place] += 1
    return lambda: flat[place].copy_(before)


def named(trainer: Trainer, name: str) -> Any:
    return dict(trainer.engine.module.named_parameters())[f"lm.{name}"]


def a_weight(trainer: Trainer) -> Callable[[], Any]:
    """The first entry of the embeddings, which is in rank 0's shard: only a copy of it changes here."""
    return changed(named(trainer, WORD).data)


def a_buffer(trainer: Trainer) -> Callable[[], Any]:
    return changed(next(b for n, b in trainer.engine.module.named_buffers() if n.endswith("position_ids")))


def a_small_weight_of_zero3(trainer: Trainer) -> Callable[[], Any]:
    parameter = named(trainer, "bert.encoder.layer.0.attention.self.query.bias")
    assert parameter.ds_persist
    return changed(parameter.data, 5)


def a_master(trainer: Trainer) -> Callable[[], Any]:
    return changed(local_fragments(trainer.engine)[0].values, 3)


def a_moment(trainer: Trainer) -> Callable[[], Any]:
    state: Any = trainer.engine.basic_optimizer.state
    return changed(next(iter(state.values()))["exp_avg"], 2)


def a_protection(trainer: Trainer) -> Callable[[], Any]:
    return changed(trainer.protection.a["heads"], 1)


def a_soft_mask(trainer: Trainer) -> Callable[[], Any]:
    return changed(trainer.protection.factors[QUERY][0].scale, 2)


def a_learning_rate(trainer: Trainer) -> Callable[[], Any]:
    group = trainer.engine.basic_optimizer.param_groups[0]
    before, group["lr"] = group["lr"], 0.5
    return lambda: group.update(lr=before)


def a_step_count(trainer: Trainer) -> Callable[[], Any]:
    state: Any = trainer.engine.basic_optimizer.state
    steps = [each["step"] for each in state.values()]
    undo = [changed(step) for step in steps]
    return lambda: [each() for each in undo]


def a_seed(trainer: Trainer) -> Callable[[], Any]:
    before = torch.get_rng_state()
    torch.manual_seed(17)
    return lambda: torch.set_rng_state(before)


def a_lost_fragment(trainer: Trainer) -> Callable[[], Any]:
    """The last parameter that this rank's optimizer steps no longer lies in its flat partition."""
    last = named(trainer, local_fragments(trainer.engine)[-1].name)
    before, last._hp_mapping = last._hp_mapping, None
    return lambda: setattr(last, "_hp_mapping", before)


def centres(trainer: Trainer) -> Callable[[], Any]:
    return changed(next(b for n, b in trainer.engine.module.named_buffers() if n.endswith("centres")), 4)


EVERYWHERE: dict[Fault, str] = {
    a_buffer: "buffer lm.bert.embeddings.position_ids is not the same on all ranks: entry 0 is 1 on rank 1, "
    "0 on rank 0",
    a_protection: "protection of heads is not the same on all ranks: entry 1 is ",
    a_soft_mask: f"soft-mask of {QUERY} along axis 0 is not the same on all ranks: entry 2 is ",
    a_learning_rate: "a learning rate on rank 1 is 0.5, planned was 0.001",
    a_step_count: "the optimizer's number of steps is (3.0,) on rank 1, (2.0,) on rank 0",
    a_seed: "the seed of dropout is 17 on rank 1, planned was ",
}
COPIES = {a_weight: f"weight lm.{WORD} is not the same on all ranks: entry 0 is "}
IN_STAGE: dict[int, dict[Fault, str]] = {
    0: {
        a_moment: f"exp_avg of {WORD} is not the same on all ranks: entry 2 is ",
        a_weight: f"weight lm.{WORD} is not the same on all ranks: entry 0 is ",
    },
    1: COPIES
    | {a_master: " in the model of rank 1, its optimizer has ", a_lost_fragment: " belong to no rank"},
    2: COPIES | {a_lost_fragment: " belong to no rank"},
    3: {
        a_small_weight_of_zero3: "weight lm.bert.encoder.layer.0.attention.self.query.bias is not the same "
        "on all ranks: entry 5 is ",
        a_master: " in the model of rank 1, its optimizer has ",
    },
}


def violations(flags: list[str], faults: list[Fault]) -> tuple[list[str], str]:
    """What is said of each fault on rank 1 after two sound steps, and of rank 1 reading rank 0's rows."""
    config, cluster = read_config(flags), join_cluster()
    inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
    said = []
    with open_log(inputs.folder.path, cluster.rank, 2) as log:
        trainer = Trainer(inputs, cluster, log)
        invariants = Invariants(trainer, every=1)
        invariants.check(0)
        protect(trainer)
        stream = trainer.stream(0)
        for step in (0, 1):
            trainer.step(stream.step(step))
            invariants.after_step(stream.step(step))
        for fault in faults:
            undo = fault(trainer) if cluster.rank == 1 else lambda: None
            said.append(violation(invariants, stream, 1))
            undo()
        invariants.after_step(stream.step(1))  # all is undone
        wrong = BatchStream(
            inputs.mixture, inputs.masking, global_batch_size=16, micro_batch_size=8, rank=0, world_size=2,
            start_step=0, num_steps=2,
        )  # fmt: skip
        rows = violation(invariants, wrong, 1)
        trainer.engine.destroy()
    return said, rows


def violation(invariants: Invariants, stream: BatchStream, step: int) -> str:
    try:
        invariants.after_step(stream.step(step))
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("stage", "bf16"), [(0, "false"), (1, "true"), (2, "false"), (3, "true")])
def test_each_fault_of_one_rank_is_named(stage: int, bf16: str, world: SmallWorld, tmp_path: Path) -> None:
    expected = EVERYWHERE | IN_STAGE[stage]
    config = REPOSITORY / "ds_configs" / f"zero{stage}.json"
    flags = arguments(
        world, tmp_path / "run", soft_mask="update", ds_config=config, bf16=bf16, warmup_ratio=0.0,
        lr_scheduler_type="constant", max_eval_samples=16,
    )  # fmt: skip
    first, second = run_ranks(2, violations, flags, list(expected))
    assert first == second, "all ranks raise the same"
    said, rows = first
    for fault, text, words in zip(expected, said, expected.values(), strict=True):
        assert text.startswith("--check_invariants, after step 2: "), fault.__name__
        assert words in text, fault.__name__
    assert "was read 2 times in step 2 (by ranks 0, 1), planned was 1" in rows or (
        "was read 0 times in step 2 (by no rank), planned was 1" in rows
    )


def test_centres_of_experts_are_compared(world: SmallWorld, tmp_path: Path) -> None:
    flags = arguments(
        world, tmp_path / "run", method="cse", cse_samples=64, cse_projection=8, cse_layers=1,
        mix=f"{world.general_corpus}:0.3", general_eval_corpus=None,
    )  # fmt: skip
    for said, rows in run_ranks(2, violations, flags, [centres]):
        assert "router.centres is not the same on all ranks: entry 4 is " in said[0]
        assert "of " + str(world.corpus) in rows or "of " + str(world.general_corpus) in rows


def corrupt(flags: list[str], step: int) -> int:
    """A bit of rank 1's weights flips while ``step`` is computed."""

    @contextlib.contextmanager
    def flipping(trainer: Trainer, batches: Any) -> Iterator[None]:
        yield
        if batches.step == step and trainer.cluster.rank == 1:
            named(trainer, WORD).data.view(-1)[7] += 1

    with around_steps(flipping):
        return run_training(flags)


def test_a_run_stops_at_the_fault_and_resumes_from_before_it(world: SmallWorld, tmp_path: Path) -> None:
    flags = arguments(
        world,
        tmp_path / "run",
        soft_mask="update",
        check_invariants=1,
        max_eval_samples=16,
        protection_steps=6,
    )
    with pytest.raises(RankError) as caught:
        run_ranks(2, corrupt, flags, 3)
    for rank in (0, 1):
        name, text = caught.value.errors[rank]
        assert name == "UserError"
        assert f"after step 4: weight lm.{WORD} is not the same on all ranks: entry 7 is " in text
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert len(losses(tmp_path / "run")) == 6


def test_ownership_has_neither_gaps_nor_overlaps() -> None:
    sound, sizes = [[("a", 0, 4), ("b", 0, 2)], [("a", 4, 6)]], {"a": 10, "b": 2}
    assert _incomplete(sound, sizes) is None
    assert _incomplete([sound[0], []], sizes) == "entries 4 to 9 of a belong to no rank"
    assert _incomplete([sound[1], []], {"b": 2, "a": 10}) == "entries 0 to 1 of b belong to no rank"
    assert _incomplete([sound[0], [("a", 3, 7)]], sizes) == "entry 3 of a belongs to rank 0 and to rank 1"
    assert "and to none (it has 10 entries)" in str(_incomplete([sound[0], [("a", 4, 7)]], sizes))
