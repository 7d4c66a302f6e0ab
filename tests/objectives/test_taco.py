"""The contrast of contexts against the formula on its own draws; what is drawn."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dga_scale.corpus.loading.batches import Batch
from dga_scale.errors import UserError
from dga_scale.objectives.methods import taco
from dga_scale.objectives.methods.taco import near_tokens, tokens_of_others
from tests.helpers.batches import rows_of
from tests.helpers.comparison import (
    assert_gradients_of_mlm_and,
    config_of,
    loss_of,
    method_of,
    training_model,
)
from tests.helpers.toy import toy_batch, toy_lm

WINDOW, NEGATIVES = 2, 7


def contexts_of(batch: Batch, lm: torch.nn.Module) -> list[Tensor]:
    """Last hidden state - embedding output (tokens of the row, H), of each row on its own."""
    contexts = []
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        states = lm(batch.masked_ids[None, row, :length], output_hidden_states=True).hidden_states
        contexts.append((states[-1] - states[0])[0])
    return contexts


def test_term_and_gradient_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, lm = toy_batch(), toy_lm()
    drawn = []

    def remembered(draw):  # what was drawn, for the reference
        def wrapped(*args):
            drawn.append(draw(*args))
            return drawn[-1]

        return wrapped

    monkeypatch.setattr(taco, "near_tokens", remembered(near_tokens))
    monkeypatch.setattr(taco, "tokens_of_others", remembered(tokens_of_others))
    model = training_model("taco", taco_window=WINDOW, taco_negatives=NEGATIVES)
    loss, terms = loss_of(model, batch)
    near, (rows, places) = drawn

    contexts = contexts_of(batch, lm)
    fixed = [context.detach() for context in contexts]
    by_row = []
    for b, context in enumerate(contexts):
        losses = []
        for i, anchor in enumerate(context):
            keys = [fixed[b][near[b, i]], *(fixed[r][p] for r, p in zip(rows[b], places[b], strict=True))]
            cosines = torch.stack([F.cosine_similarity(anchor, key, dim=0) for key in keys]) / 0.07
            losses.append(torch.logsumexp(cosines, 0) - cosines[0])
        by_row.append(torch.stack(losses).mean())
    expected = torch.stack(by_row).mean()
    expected.backward()
    assert terms["taco"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert_gradients_of_mlm_and(lm, model.lm, batch)


def test_positives_are_other_tokens_within_the_window() -> None:
    """Over many draws each neighbour occurs about as often as every other, and nothing else does."""
    lengths, tokens = torch.tensor([9, 3, 2]), 9
    torch.manual_seed(0)
    draws = torch.stack([near_tokens(lengths, tokens, WINDOW) for _ in range(2000)])  # (draws, B, T)
    for row, length in enumerate(lengths.tolist()):
        for i in range(length):
            allowed = [j for j in range(length) if j != i and abs(j - i) <= WINDOW]
            counts = draws[:, row, i].bincount(minlength=tokens)
            assert counts[allowed].min() > 0.8 * 2000 / len(allowed)
            assert counts[allowed].sum() == 2000


def test_negatives_are_real_tokens_of_other_sequences() -> None:
    """Each of those about as often as every other."""
    lengths = torch.tensor([4, 2, 3])
    torch.manual_seed(0)
    rows, places = tokens_of_others(lengths, 20_000)
    for b in range(3):
        others = [(r, p) for r, n in enumerate(lengths.tolist()) if r != b for p in range(n)]
        counts = torch.zeros(3, 4, dtype=torch.long)
        counts.index_put_((rows[b], places[b]), torch.tensor(1), accumulate=True)
        found = torch.stack([counts[r, p] for r, p in others])
        assert found.sum() == 20_000
        assert found.min() > 0.9 * 20_000 / len(others)


def test_draws_repeat_with_torchs_seed() -> None:
    def term(seed: int) -> float:
        torch.manual_seed(seed)
        return loss_of(model, toy_batch())[1]["taco"].item()

    model = training_model("taco")
    assert term(1) == term(1) != term(2)


def test_one_sequence_in_a_pass_is_refused() -> None:
    with pytest.raises(UserError, match="--per_device_train_batch_size"):
        loss_of(training_model("taco"), rows_of(toy_batch(), slice(0, 1)))
    with pytest.raises(UserError, match="--per_device_train_batch_size"):
        method_of("taco").check(config_of("taco", per_device_train_batch_size=1), causal=False)
    method_of("taco").check(config_of("taco", per_device_train_batch_size=2), causal=False)
