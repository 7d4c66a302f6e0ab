"""CSE as whole runs on two ranks: experts found, trained, resumed, and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from dga_scale.backbone.extended import ExtendedForMaskedLM
from dga_scale.config.methods.cse import CSESettings
from dga_scale.experts.clustering import NoClusters
from dga_scale.experts.extension import Sample, SublayerId, sparse_sublayers
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.logging.json_lines import read_log
from dga_scale.objectives.methods.cse import CSE
from tests.helpers.ranks import REPOSITORY, RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import STEPS, arguments, losses, run_and_listen, run_training, run_until


def flags_of(world: SmallWorld, run: Path, stage: int = 2, **settings: Any) -> list[str]:
    own = {
        "ds_config": REPOSITORY / "ds_configs" / f"zero{stage}.json",
        "mix": f"{world.general_corpus}:0.4",
        "cse_samples": 192,
        "cse_projection": 32,
        "cse_alpha": 0.9,
    }
    return arguments(world, run, method="cse", **{**own, **settings})


def test_a_run_that_is_stopped_resumes_bit_for_bit(world: SmallWorld, tmp_path: Path) -> None:
    stage = 3
    whole = flags_of(world, tmp_path / "whole", stage)
    # Blocks that are computed twice give the same numbers.
    parts = flags_of(world, tmp_path / "parts", stage, gradient_checkpointing=stage == 3)
    printed, _ = run_ranks(2, run_and_listen, whole)
    assert "layer 1 ffn: " in printed
    assert run_ranks(2, run_until, parts, 3, 1) == [EXIT_STOPPED] * 2
    assert run_ranks(2, run_training, parts) == [0, 0]
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == STEPS
    # Distances are from the clusters' centres, also where a run has resumed; events come every two steps.
    found = json.loads((tmp_path / "whole" / "experts.json").read_text())["clusters"]
    records = [r for r in read_log(tmp_path / "whole" / "log.jsonl") if r.get("event") == "cse"]
    assert [r["step"] for r in records[:: len(found)]] == [2, 4, 6]
    last = {name: records_of(tmp_path / name, len(found)) for name in ("whole", "parts")}
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "model")
    for each, record, again, sublayer in zip(
        found, *last.values(), sparse_sublayers(model).values(), strict=True
    ):
        assert record["kind"] == each["sublayer"]
        assert sum(record["share"]) == pytest.approx(1)
        assert again["centre_moved"] == record["centre_moved"]
        distance = (sublayer.router.centres - torch.tensor(each["centres"])).norm(dim=1)
        assert record["centre_moved"] == pytest.approx((distance / sublayer.router.radii).tolist(), rel=1e-5)
    report = (tmp_path / "whole" / "report.html").read_text()
    assert ", ".join(f"{share:.1%}" for share in last["whole"][0]["share"]) in report


def records_of(run: Path, sublayers: int) -> list[dict[str, Any]]:
    """The last record of each sublayer's experts."""
    return [record for record in read_log(run / "log.jsonl") if record.get("event") == "cse"][-sublayers:]


def test_what_is_exported(world: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, run_training, flags_of(world, run, dropout=0.2)) == [0, 0]
    structure = json.loads((run / "experts.json").read_text())
    model = AutoModelForMaskedLM.from_pretrained(run / "model")
    assert type(model) is ExtendedForMaskedLM
    assert model.config.extension_settings == structure["settings"]
    assert model.config.base.hidden_dropout_prob == 0.1, "the run's own override is not passed on"
    sublayers = sparse_sublayers(model)
    assert [str(place) for place in sublayers] == [each["sublayer"] for each in structure["clusters"]]
    assert len(sublayers) == 4  # attention and FFN of the two last layers
    for each, sublayer in zip(structure["clusters"], sublayers.values(), strict=True):
        assert len(each["sizes"]) == len(sublayer.router.centres) >= 2
        assert sum(each["sizes"]) == 192
        first, second = (next(iter(sublayer.expert(i)[0].parameters())) for i in (0, 1))
        assert not torch.equal(first, second), "experts have learnt apart"
        assert sublayer.router.radii.tolist() == pytest.approx(each["radii"], rel=1e-6)
    steps = losses(run)
    assert steps[-1] < steps[0]
    classifier = AutoModelForSequenceClassification.from_pretrained(run / "model", num_labels=2)
    assert len(sparse_sublayers(classifier)) == 4
    # Another run starts with the experts, here of another method and ZeRO-3.
    again = tmp_path / "again"
    ds_config = REPOSITORY / "ds_configs" / "zero3.json"
    printed, _ = run_ranks(
        2, run_and_listen, flags_of(world, again, model=run / "model", ds_config=ds_config, max_steps=2)
    )
    assert "experts already" in printed
    assert AutoModelForMaskedLM.from_pretrained(again / "model").config.extension == "experts"


def test_a_sublayer_whose_text_is_in_one_piece_stays_dense() -> None:
    torch.manual_seed(0)
    blob = 0.01 * torch.randn(60, 4)
    parted = torch.cat([blob, blob + 5])
    whole = Sample(torch.cat([blob, blob]), torch.eye(4))
    method = CSE(CSESettings(cse_eps=1.0))
    first, second = SublayerId(0, "ffn"), SublayerId(1, "ffn")
    found, dense = method._clusters({first: Sample(parted, torch.eye(4)), second: whole})
    assert list(found) == [first]
    assert found[first].sizes == [60, 60]
    assert len(dense) == 1
    assert "layer 1 ffn" in dense[0]
    with pytest.raises(NoClusters, match="layer 0 ffn"):
        method._clusters({first: whole, second: whole})


def test_what_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"DBSCAN finds one cluster in 192 sequences of the training text"):
        run_ranks(2, run_training, flags_of(world, tmp_path / "a", cse_eps=1000.0))
    with pytest.raises(RankError, match=r"--cse_layers 3: the model has 2 layers"):
        run_ranks(2, run_training, flags_of(world, tmp_path / "b", cse_layers=3))
    with pytest.raises(RankError, match=r"--cse_alpha 1.0: must be between 0 and 1"):
        run_ranks(2, run_training, flags_of(world, tmp_path / "c", cse_alpha=1.0))
