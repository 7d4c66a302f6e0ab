"""Going on from a checkpoint: elsewhere with all that belongs to it, and to more steps than were planned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from dga_scale.backbone.weights_hash import weights_hash
from tests.helpers.damage import DAMAGES
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_methods import OWN
from tests.test_train import arguments, losses, refusal, run_and_listen, run_training

STEPS, HALF = 4, 2
COMPANIONS = {
    "dga": ["importance.safetensors"],
    "cse": ["experts.json"],
    "ewc": ["fisher/manifest.json", "fisher/rank-00000.safetensors", "fisher/rank-00001.safetensors"],
    "headless": ["head.safetensors"],
}


@pytest.fixture(scope="module")
def headless(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's model without its LM head."""
    folder = tmp_path_factory.mktemp("models") / "headless"
    shutil.copytree(world.model, folder)
    BertModel.from_pretrained(world.model).save_pretrained(folder)
    return folder


def flags_of(world: SmallWorld, headless: Path, kind: str, run: Path, **settings: Any) -> list[str]:
    own: dict[str, Any] = {
        "dga": {"method": "dga", "soft_mask": "update"},
        "cse": {"method": "cse", "mix": f"{world.general_corpus}:0.3", **OWN["cse"]},
        "ewc": {"method": "ewc", "general_corpus": world.general_corpus, "fisher_samples": 16},
        "headless": {"method": "mlm", "model": headless, "head_warmup_steps": 3},
    }[kind]
    return arguments(world, run, **{"max_steps": STEPS, **own, **settings})


@pytest.fixture(scope="module")
def straight(
    world: SmallWorld, headless: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A run of each kind over all steps without a stop, with a checkpoint half way."""
    folder = tmp_path_factory.mktemp("straight")

    def run_of(kind: str) -> Path:
        if not (folder / kind).exists():
            assert run_ranks(2, run_training, flags_of(world, headless, kind, folder / kind)) == [0, 0]
        return folder / kind

    return run_of


def half_way(run: Path) -> Path:
    return run / "checkpoints" / f"step-{HALF:06d}"


def weights(run: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: weights and moments."""
    found: dict[str, Tensor] = {}
    for file in sorted((run / "checkpoints" / f"step-{STEPS:06d}").glob("rank-*")):
        found |= {f"{file.name}: {name}": tensor for name, tensor in load_file(file).items()}
    return found


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


# --- in another folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMPANIONS)
def test_a_run_that_resumes_elsewhere_is_the_one_that_never_stopped(
    straight: Callable[[str], Path], world: SmallWorld, headless: Path, tmp_path: Path, kind: str
) -> None:
    first, new = straight(kind), tmp_path / "new"
    flags = flags_of(world, headless, kind, new, resume=half_way(first))
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert losses(new) == losses(first)[HALF:]
    expected, found = weights(first), weights(new)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in COMPANIONS[kind]:
        assert (new / name).read_bytes() == (first / name).read_bytes()
    # What it was before training is what the base model was.
    assert summary_of(new)["domain_loss"] == summary_of(first)["domain_loss"]
    assert summary_of(new)["general_loss"] == summary_of(first)["general_loss"]
    manifest = json.loads((new / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").read_text())
    assert set(manifest["companions"]) == {name for name in COMPANIONS[kind] if "rank" not in name}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in COMPANIONS for file in COMPANIONS[kind]])
def test_what_goes_with_a_checkpoint_is_not_made_again(
    straight: Callable[[str], Path], world: SmallWorld, headless: Path, tmp_path: Path, kind: str, file: str
) -> None:
    run = Path(shutil.copytree(straight(kind), tmp_path / "run"))
    kept = (run / file).read_bytes()
    for number, damage in enumerate(("deleted", "truncated", "middle byte flipped")):
        DAMAGES[damage](run / file)
        new = tmp_path / f"new-{number}"
        said = refusal(flags_of(world, headless, kind, new, resume=half_way(run)))
        assert str(run / file) in said, damage
        assert "\n" not in said
        assert not [path for path in new.rglob("*.safetensors") if not path.parent.name.endswith(".tmp")]
        if "rank" not in file:  # those of a Fisher are looked at when it is read
            assert str(run / file) in refusal(flags_of(world, headless, kind, run))
        (run / file).write_bytes(kept)


def test_importance_of_another_run_does_not_slip_in(
    straight: Callable[[str], Path], world: SmallWorld, headless: Path, tmp_path: Path
) -> None:
    """Neither one that fits its own checksum, in the run's place, nor one that lies in the new folder."""
    run, new = Path(shutil.copytree(straight("dga"), tmp_path / "run")), tmp_path / "new"
    other = tmp_path / "other"
    flags = flags_of(world, headless, "dga", other, importance_samples=32, max_steps=1)
    assert run_ranks(2, run_training, flags) == [0, 0]
    shutil.copy(other / "importance.safetensors", run / "importance.safetensors")
    said = refusal(flags_of(world, headless, "dga", new, resume=half_way(run)))
    assert f"{run / 'importance.safetensors'} is not the file that {half_way(run)} was trained with" in said
    shutil.copy(straight("dga") / "importance.safetensors", run / "importance.safetensors")
    shutil.copy(other / "importance.safetensors", new / "importance.safetensors")
    said = refusal(flags_of(world, headless, "dga", new, resume=half_way(run)))
    assert f"{new / 'importance.safetensors'} is not {run / 'importance.safetensors'}" in said


def test_another_base_model_is_refused_whatever_its_name(
    straight: Callable[[str], Path], world: SmallWorld, headless: Path, tmp_path: Path
) -> None:
    """A copy elsewhere is the same one."""
    run, copy = straight("dga"), Path(shutil.copytree(world.model, tmp_path / "copy"))
    assert weights_hash(str(copy), False) == weights_hash(str(world.model), False)
    flags = flags_of(world, headless, "dga", tmp_path / "new", resume=half_way(run), model=copy)
    torch.manual_seed(5)
    BertForMaskedLM(BertConfig.from_pretrained(copy)).save_pretrained(copy)
    said = refusal(flags)
    assert f"was trained from other weights than --model {copy} holds now" in said
    assert not (tmp_path / "new").exists()


def test_importances_of_earlier_domains_are_those_that_the_run_began_with(
    world: SmallWorld, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    das = {"method": "das", "max_steps": 1}
    assert run_ranks(1, run_training, arguments(world, first, **das)) == [0]
    prior = Path(shutil.copy(first / "importance.safetensors", tmp_path / "prior.safetensors"))
    flags = arguments(world, second, prior_importance=prior, **das)
    assert run_ranks(1, run_training, flags) == [0]
    shutil.copy(first / "importance-after.safetensors", prior)
    assert "other files of --prior_importance than these" in refusal(flags)


# --- to more steps ---------------------------------------------------------------------------------------


def constant_flags(world: SmallWorld, run: Path, **settings: Any) -> list[str]:
    values = {
        "method": "mlm",
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "warmup_ratio": 0.5,
        **settings,
    }
    return arguments(world, run, **values)


@pytest.fixture(scope="module")
def short(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps at a constant learning rate after 2 of warm-up."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert run_ranks(1, run_training, constant_flags(world, run)) == [0]
    return run


def test_a_constant_schedule_is_extended_as_if_it_had_been_longer(
    short: Path, world: SmallWorld, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short, tmp_path / "run"))
    (said,) = run_ranks(1, run_and_listen, constant_flags(world, run, max_steps=6))
    assert "warm-up over 2 steps to 0.001, then 0.001 up to step 6" in said
    longer = constant_flags(world, tmp_path / "longer", max_steps=6, warmup_ratio=2 / 6)
    assert run_ranks(1, run_training, longer) == [0]
    assert losses(run) == losses(tmp_path / "longer")
    # What a finished run left of its 4 steps is of 6 now.
    assert summary_of(run)["steps"] == 6
    model, expected = (load_file(each / "model" / "model.safetensors") for each in (run, tmp_path / "longer"))
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    # And resumes as what it is now.
    assert run_ranks(1, run_training, constant_flags(world, run, max_steps=6)) == [0]
    assert len(losses(run)) == 6


def test_a_method_that_protects_does_not_go_on_from_a_run_that_did_not(
    short: Path, world: SmallWorld, tmp_path: Path
) -> None:
    """It would measure what general knowledge needs on the adapted model."""
    checkpoint = short / "checkpoints" / "step-000002"
    flags = arguments(world, tmp_path / "new", method="dga", resume=checkpoint)
    with pytest.raises(RankError, match=r"importance\.safetensors is missing"):
        run_ranks(1, run_training, flags)


def test_fewer_steps_than_were_done_are_refused(short: Path, world: SmallWorld) -> None:
    said = refusal(constant_flags(world, short, max_steps=3))
    assert "--max_steps 3" in said
    assert "has done 4 steps already" in said


def test_a_linear_schedule_is_extended_in_a_new_folder(world: SmallWorld, tmp_path: Path) -> None:
    first, new = tmp_path / "first", tmp_path / "new"
    settings: dict[str, Any] = {"lr_scheduler_type": "linear"}
    assert run_ranks(1, run_training, constant_flags(world, first, **settings)) == [0]
    said = refusal(constant_flags(world, first, max_steps=8, **settings))
    last = first / "checkpoints" / "step-000004"
    assert f"--resume {last} --output_dir NEW --max_steps 8" in said
    flags = constant_flags(world, new, max_steps=8, resume=last, **settings)
    (said,) = run_ranks(1, run_and_listen, flags)
    assert (
        "a new schedule: from step 4 on, warm-up over 2 steps to 0.001, then linear decay to 0 at step 8"
        in said
    )
    log = [json.loads(line) for line in (new / "log.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in log if "learning_rate" in record]
    assert rates == pytest.approx([0.0005, 0.001, 0.001, 0.0005])
    # The same command resumes from its own checkpoints, with the schedule that it began.
    shutil.rmtree(new / "checkpoints" / "step-000008")
    (said,) = run_ranks(1, run_and_listen, flags)
    assert f"resuming from {new / 'checkpoints' / 'step-000006'}" in said
    log = [json.loads(line) for line in (new / "log.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in log if "learning_rate" in record] == rates


# --- evaluations of another text -------------------------------------------------------------------------


def test_a_base_that_was_not_measured_on_the_text_is_said_so_everywhere(
    short: Path, world: SmallWorld, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short, tmp_path / "run"))
    flags = constant_flags(world, run, max_steps=5, max_eval_samples=16)
    (said,) = run_ranks(1, run_and_listen, flags)
    assert said.count("not measured") == 2  # domain and general
    summary = summary_of(run)
    assert summary["domain_loss"]["before"] is None
    assert summary["texts"]["domain"]["rows"] == 16
    assert "not measured" in (run / "report.html").read_text()
    assert "| domain loss | not measured |" in (run / "model" / "README.md").read_text()
    # Once more on the old rows: what is known of the base counts again.
    assert run_ranks(1, run_training, constant_flags(world, run, max_steps=6)) == [0]
    assert summary_of(run)["domain_loss"]["before"] == summary_of(short)["domain_loss"]["before"]
