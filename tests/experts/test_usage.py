"""The usage of experts, counted by hand; that idle ones stand still: ``test_under_deepspeed``."""

import math

import pytest
import torch

from dga_scale.experts.extension import sparse_sublayers, update_centres_every
from dga_scale.experts.usage import ExpertUsage
from tests.helpers.small_experts import ROWS, with_experts
from tests.helpers.tiny_models import TINY


def test_shares_and_distances_are_those_of_the_sequences() -> None:
    model = with_experts(TINY["bert"].model()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # else the routes are those of noisy states
    update_centres_every(model, 2)
    for each in sparse_sublayers(model).values():
        each.router.centres += 0.01  # they lie on the sequences that they were made from
    said: list[str] = []
    usage = ExpertUsage(model, said.append)
    starts = {place: each.router.centres.clone() for place, each in sparse_sublayers(model).items()}
    chosen: dict[str, list[int]] = {str(place): [] for place in starts}

    def step(*batches: slice) -> None:
        for rows in batches:
            model(**{name: tensor[rows] for name, tensor in ROWS.items()})
            for place, each in sparse_sublayers(model).items():
                chosen[str(place)] += each.last[1].tolist()

    for batches in ([slice(0, 5), slice(5, 8)], [slice(0, 3), slice(0, 8)]):
        step(*batches)
    figures = usage.figures()
    assert figures.keys() == chosen.keys() == {"layer 1 attention", "layer 1 ffn"}
    for place, each in sparse_sublayers(model).items():
        own = chosen[str(place)]
        assert figures[str(place)]["share"] == [own.count(index) / 19 for index in range(3)]
        for index, moved in enumerate(figures[str(place)]["centre_moved"]):
            distance = math.dist(each.router.centres[index].tolist(), starts[place][index].tolist())
            assert moved == pytest.approx(distance / each.router.radii[index].item(), rel=1e-5)
            assert moved > 0
    assert said == []  # each expert was used
    # From then on only one sequence: the last call's are not counted again, and who is empty is said once.
    chosen = {place: [] for place in chosen}
    step(slice(0, 1), slice(0, 1))
    for place, shares in ((place, values["share"]) for place, values in usage.figures().items()):
        assert shares == [chosen[place].count(index) / 2 for index in range(3)]
    assert len(said) == 1
    empty = {(place, index) for place, own in chosen.items() for index in range(3) if index not in own}
    assert len(empty) >= 3
    assert all(f"{place} expert {index}" in said[0] for place, index in empty)
    step(slice(0, 1), slice(0, 1))
    usage.figures()
    assert len(said) == 1


def test_a_parameter_is_idle_where_no_sequence_gives_it_a_gradient() -> None:
    model = with_experts(TINY["llama"].model()).train()
    usage = ExpertUsage(model, print)
    one = {name: tensor[:1] for name, tensor in ROWS.items()}
    model(**one, labels=one["input_ids"]).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert usage.idle_parameters() == without
