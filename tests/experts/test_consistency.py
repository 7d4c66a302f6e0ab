"""Gradient consistency against NumPy's SVD and gradients taken one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.errors import UserError
from dga_scale.experts.consistency import (
    block_parameters,
    consistency,
    sequence_gradients,
    shared_direction,
)
from tests.helpers.flags import changed
from tests.helpers.small import make_world
from tests.helpers.tiny_models import TINY, batch


def gradients(count: int, seed: int, towards: torch.Tensor | None = None) -> torch.Tensor:
    noise = torch.randn(count, 40, generator=torch.Generator().manual_seed(seed))
    return noise if towards is None else noise + 3 * towards


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def direction(matrix: np.ndarray) -> np.ndarray:
    """u_max^T J by the SVD, whose left vectors are the eigenvectors of J J^T."""
    left, _, _ = np.linalg.svd(matrix)
    top = left[:, 0]
    return (top if top.sum() >= 0 else -top) @ matrix


def test_direction_and_consistency_are_the_formulas() -> None:
    common = torch.randn(40, generator=torch.Generator().manual_seed(9))
    groups = {"head": gradients(12, 0, common), "tail": gradients(5, 1), "against": gradients(4, 2, -common)}
    found = consistency(groups)
    matrices = {name: each.double().numpy() for name, each in groups.items()}
    everything = direction(np.concatenate(list(matrices.values())))
    np.testing.assert_allclose(
        shared_direction(torch.cat(list(groups.values()))).numpy(), everything, rtol=1e-6, atol=1e-9
    )
    for name, matrix in matrices.items():
        assert found[name].group == pytest.approx(cosine(direction(matrix), everything), abs=1e-9)
        expected = [cosine(row, everything) for row in matrix]
        np.testing.assert_allclose(found[name].rows.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert found["head"].group > 0.95
    assert abs(found["tail"].group) < 0.6
    assert found["against"].group < -0.8
    assert found["against"].as_dict()["share_below_0"] == 1.0


def test_alone_a_group_is_consistent_with_itself() -> None:
    found = consistency({"all": gradients(6, 3)})
    assert found["all"].group == pytest.approx(1.0, abs=1e-12)
    single = consistency({"one": gradients(1, 4)})
    assert single["one"].rows.tolist() == pytest.approx([1.0])


def test_gradients_are_those_of_one_block_and_sequence() -> None:
    model = TINY["bert"].model().train()
    anatomy = anatomy_of(model)
    ids = batch(rows=3)["input_ids"][:2]
    parameters = block_parameters(model, anatomy, 1)

    def loss(row: int) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=ids[row : row + 1]).logits[0], ids[row])

    found = sequence_gradients(model, parameters, [lambda: loss(0), lambda: loss(1)], 2)
    assert model.training
    model.eval()
    for row in range(2):
        model.zero_grad()
        loss(row).backward()
        block = [p.grad.flatten() for n, p in model.named_parameters() if "encoder.layer.1." in n]
        torch.testing.assert_close(found[row], torch.cat(block))
    with pytest.raises(UserError, match="--layer 2: the model's layers are 0 to 1"):
        block_parameters(model, anatomy, 2)
    with pytest.raises(UserError, match=r"need .* GiB of memory.* lower --rows to"):
        sequence_gradients(model, parameters, [], 10**12)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dga_scale.report.consistency import main

    world = make_world(tmp_path)
    output = tmp_path / "out"
    corpora = [str(world.corpus), str(world.general_corpus)]
    arguments = ["--model", str(world.model), "--corpus", *corpora, "--rows", "6", "--output", str(output)]
    main(arguments)
    content = json.loads((output / "consistency.json").read_text())
    assert content["layer"] == 1
    assert content["corpora"] == dict(zip(("corpus", "general_corpus"), corpora, strict=True))
    for each in content["consistency"].values():
        assert each["sequences"] == len(each["rows"]) == 6
        assert -1 <= each["group"] <= 1
    assert (output / "consistency.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "general_corpus: consistency" in printed
    main([*arguments[:-1], str(tmp_path / "again")])
    assert (tmp_path / "again" / "consistency.json").read_text() == (
        (output / "consistency.json").read_text()
    )
    with pytest.raises(UserError, match="--rows 1: must be at least 2"):
        main(changed(arguments, "--rows", "1"))
