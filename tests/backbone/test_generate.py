"""Generation through an extension, against greedy decoding by hand that reads the whole text every time."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import ExtendedPreTrainedModel, extend
from dga_scale.errors import UserError
from dga_scale.experts.sublayers import sublayer_modules
from tests.helpers.small_experts import move_apart, only, with_experts
from tests.helpers.small_prompts import WORDS, with_prompt
from tests.helpers.tiny_models import TINY, batch

CAUSAL = ["gpt2", "llama", "gpt_neox"]
IDS = batch(rows=4, tokens=5, seed=2)["input_ids"][:3].clamp(max=int(WORDS[0]) - 1)
LONG, SHORT = IDS[:2], IDS[2:, 2:]
PAD = 1
NEW = 5
EXACT = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TINY[name].model()


def specialised(name: str) -> ExtendedPreTrainedModel:
    torch.manual_seed(0)
    model = with_experts(TINY[name].model(), "attention")
    move_apart(model)
    return model


def adapted(name: str) -> ExtendedPreTrainedModel:
    torch.manual_seed(0)
    model = extend(TINY[name].model(), "adapter", {"size": 4, "activation": "gelu"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_behind_words(name: str) -> Callable[[Tensor], Tensor]:
    """The prompt spelled out: its soft tokens are the embeddings of words."""
    model = plain(name)
    return lambda ids: model(torch.cat([WORDS[None], ids], dim=1)).logits[0, -1]


def logits_of_chosen_expert(name: str) -> Callable[[Tensor], Tensor]:
    """Dense models, each with one expert's weights in the sublayer's place, chosen by the formula."""
    sparse, dense = only(specialised(name)), plain(name)
    (attention,) = sublayer_modules(anatomy_of(dense), 1, "attention")
    models = [copy.deepcopy(dense) for _ in range(3)]
    for index, model in enumerate(models):
        model.get_submodule(attention).load_state_dict(sparse.expert(index)[0].state_dict())
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    dense.get_submodule(attention).register_forward_pre_hook(keep, with_kwargs=True)

    def logits(ids: Tensor) -> Tensor:
        dense(ids)
        feature = inputs[-1][0].mean(dim=0) @ sparse.router.projection
        ratios = [torch.dist(feature, sparse.router.centres[j]) / sparse.router.radii[j] for j in range(3)]
        return models[int(torch.stack(ratios).argmin())](ids).logits[0, -1]

    return logits


def logits_of_adapters(name: str) -> Callable[[Tensor], Tensor]:
    model = adapted(name)
    return lambda ids: model(ids, use_cache=False).logits[0, -1]


EXTENDED = {
    "prompt": (with_prompt, logits_behind_words),
    "experts": (specialised, logits_of_chosen_expert),
    "adapter": (adapted, logits_of_adapters),
}


def by_hand(logits: Callable[[Tensor], Tensor], ids: Tensor) -> list[int]:
    """Greedy; no text ends before its time."""
    new: list[int] = []
    for _ in range(NEW):
        scores = logits(torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1))
        scores[TINY["llama"].config().eos_token_id] = -torch.inf
        new.append(int(scores.argmax()))
    return new


@pytest.mark.parametrize("extension", EXTENDED)
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_greedy_text_is_that_of_decoding_by_hand(name: str, extension: str, tmp_path: Path) -> None:
    """One text, several, and texts of different lengths padded on the left; also after saving and loading."""
    make, reference = EXTENDED[extension]
    model, logits = make(name), reference(name)
    expected = [by_hand(logits, ids[None]) for ids in LONG]
    assert model.generate(LONG[:1], **EXACT)[:, 5:].tolist() == expected[:1]
    assert model.generate(LONG, **EXACT, use_cache=False)[:, 5:].tolist() == expected
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    expected.append(by_hand(logits, SHORT))
    padded = torch.cat([LONG, nn.functional.pad(SHORT, (2, 0), value=PAD)])
    mask = torch.ones_like(padded)
    mask[-1, :2] = 0
    found = model.generate(padded, attention_mask=mask, generation_config=GenerationConfig(**EXACT))
    assert found[:, 5:].tolist() == expected


@torch.no_grad()
def test_beams_and_samples_behind_a_prompt_are_those_behind_words() -> None:
    model, words = with_prompt("llama"), plain("llama")
    spelled_out = torch.cat([WORDS.expand(2, -1), LONG], dim=1)
    for how in ({"num_beams": 3}, {"do_sample": True, "top_k": 0}, {"num_beams": 3, "do_sample": True}):
        torch.manual_seed(1)
        ours = model.generate(LONG, **EXACT | how)
        torch.manual_seed(1)
        theirs = words.generate(spelled_out, **EXACT | how)
        assert ours[:, 5:].tolist() == theirs[:, 5 + len(WORDS) :].tolist()


@torch.no_grad()
def test_adapters_keep_a_cache() -> None:
    model = adapted("llama")
    expected = [by_hand(logits_of_adapters("llama"), ids[None]) for ids in LONG]
    assert model.generate(LONG, **EXACT, use_cache=True)[:, 5:].tolist() == expected


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [with_prompt, specialised])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_cache_is_refused_where_there_can_be_none(
    make: Callable[[str], ExtendedPreTrainedModel], name: str
) -> None:
    model = make(name)
    embeddings = model.get_input_embeddings()(LONG)
    for refused in (
        lambda: model.generate(LONG[:1], **EXACT, use_cache=True),
        lambda: model.generate(LONG, **EXACT, use_cache=True),
        lambda: model.generate(LONG, generation_config=GenerationConfig(**EXACT, use_cache=True)),
        lambda: model.generate(LONG, **EXACT, past_key_values=DynamicCache()),
        # transformers keeps a cache here whatever it is told.
        lambda: model.generate(inputs_embeds=embeddings, **EXACT, use_cache=False),
        lambda: model(LONG, use_cache=True),
    ):
        with pytest.raises(UserError, match="generate from token ids, with use_cache=False"):
            refused()
    model.config.use_cache = True
    with pytest.raises(UserError, match="use_cache=False"):
        model(LONG)
