"""FLOPs of every architecture against PyTorch's counter, to the last operation, whatever is trained of it."""

from collections.abc import Callable

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy, anatomy_of
from dga_scale.backbone.extended import extend
from dga_scale.backbone.flops import Flops, model_flops
from dga_scale.backbone.layers import freeze
from dga_scale.backbone.peft.adapters import ADAPTER
from dga_scale.backbone.peft.lora import inject_lora
from dga_scale.backbone.peft.prompt import PROMPT
from dga_scale.objectives.added import train_only
from tests.helpers.tiny_models import TINY, batch

ROWS, TOKENS, LABELS = 3, 11, 12
Made = tuple[PreTrainedModel, Anatomy]


def frozen(name: str, layers: int, embeddings: bool) -> Made:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    freeze(model, anatomy, layers, embeddings)
    return model, anatomy


def with_lora(name: str, *roles: str) -> Made:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    inject_lora(model, anatomy, roles=roles, rank=2, alpha=4, dropout=0.0)
    return model, anatomy


def with_extension(name: str, extension: str, part: str, **settings: object) -> Made:
    model = extend(TINY[name].model(), extension, settings)
    train_only(model, part)
    return model, anatomy_of(model)


TRAINED: dict[str, Callable[[str], Made]] = {
    "all": lambda name: frozen(name, 0, False),
    "all but the embeddings": lambda name: frozen(name, 0, True),
    "the upper layer and the embeddings": lambda name: frozen(name, 1, False),
    "the upper layer": lambda name: frozen(name, 1, True),
    "lora of queries and values": lambda name: with_lora(name, "query", "value"),
    "lora of the FFN": lambda name: with_lora(name, "down"),
    "adapters": lambda name: with_extension(name, "adapter", ADAPTER, size=6, activation="gelu"),
    "a prompt": lambda name: with_extension(name, "prompt", PROMPT, tokens=3),
}
RELATIVE = {"deberta-v2 relative": 34, "deberta-v3": 8}
"""DeBERTas, and the distances that each looks up to; they project a table of twice as many once a batch."""


def counted(model: PreTrainedModel, anatomy: Anatomy, *, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        states = anatomy.trunk(model)(**batch(ROWS, TOKENS)).last_hidden_state
        logits = anatomy.lm_logits(model, states[:, : LABELS // ROWS])
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def of(flops: Flops) -> float:
    return flops.trunk(ROWS, TOKENS) + flops.head(LABELS)


@pytest.mark.parametrize("name", TINY)
def test_passes_are_those_torch_counts(name: str) -> None:
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    flops = model_flops(model, anatomy)
    # For keys and for queries, in 2 layers.
    table = 2 * 2 * (2 * 2 * RELATIVE.get(name, 0) * 32 * 32)
    assert of(flops.forward) + table == counted(model, anatomy, backward=False)
    assert of(flops.training) + 3 * table == counted(model, anatomy, backward=True)
    assert flops.training == flops.from_embeddings


@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_go_no_deeper_than_what_is_trained(trained: str) -> None:
    for name in TINY:
        if name not in RELATIVE:
            model, anatomy = TRAINED[trained](name)
            found = of(model_flops(model, anatomy).training)
            assert found == counted(model, anatomy, backward=True), name
