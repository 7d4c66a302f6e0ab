"""The distillation token against a text that has it spelled out; where it stands, in every architecture."""

import pytest
import torch
import torch.nn.functional as F

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.comparison import (
    config_of,
    gradients_of,
    loss_of,
    method_context,
    method_of,
    states_of,
    training_model,
)
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import VOCAB, toy_batch, toy_lm


def test_term_is_that_of_a_word_whose_embedding_is_the_token() -> None:
    """The same number from input ids: one word of the vocabulary gets the token's embedding."""
    batch, lm, teacher = toy_batch(), toy_lm(), toy_lm(seed=1).eval()
    model = training_model("adapted_deit")
    word = VOCAB - 1
    batch.input_ids[batch.input_ids == word] = 5
    with torch.no_grad():
        lm.bert.embeddings.word_embeddings.weight[word] = model.method.token.weight
    losses = []
    for row, pooled in enumerate(states_of(teacher, batch, False)):
        length = int(batch.attention_mask[row].sum())
        ids = torch.cat([batch.input_ids[row, :length], torch.tensor([word])])
        state = lm.bert(ids[None]).last_hidden_state[0, -1]
        losses.append(1 - F.cosine_similarity(state, pooled.mean(dim=0), dim=0))
    loss, terms = loss_of(model, batch)
    assert terms["adapted_deit"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    loss.backward()
    assert model.method.token.weight.grad.abs().max() > 0
    assert "method.token.weight" in dict(model.named_parameters())
    mlm = training_model("mlm")
    loss_of(mlm, batch)[0].backward()
    assert gradients_of(model.lm).keys() == gradients_of(mlm.lm).keys()


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reads_a_text_with_the_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is that of a word with its embedding; a text of full length gives up its last token."""
    lm = TINY[name].model()
    anatomy = anatomy_of(lm)
    method = method_of("adapted_deit")
    method.prepare(method_context(lm, config_of("adapted_deit")))
    model = TrainingModel(lm, anatomy, method, teacher=TINY[name].model()).eval()
    longest = min(anatomy.max_positions, 34)  # BLOOM's has no end
    monkeypatch.setattr(method, "max_positions", longest)
    batch = toy_batch(3, tokens=longest)
    batch.attention_mask[0, :] = 1
    batch.input_ids.clamp_(min=3)
    word = 95
    batch.input_ids[batch.input_ids == word] = 5
    states = []
    with torch.no_grad():
        _, terms = loss_of(model, batch)
        scale = getattr(lm.get_input_embeddings(), "scalar_embed_scale", 1.0)  # Gemma's
        lm.get_input_embeddings().weight[word] = method.token.weight / scale
        for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
            ids = torch.cat([batch.input_ids[row, : min(length, longest - 1)], torch.tensor([word])])
            states.append(lm.base_model(ids[None]).last_hidden_state[0, -1])
        teachers = [t.mean(dim=0) for t in states_of(model.teacher, batch, False)]
    cosines = F.cosine_similarity(torch.stack(states), torch.stack(teachers))
    assert terms["adapted_deit"].item() == pytest.approx((1 - cosines).mean().item(), rel=1e-4)
