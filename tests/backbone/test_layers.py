"""Depths of parameters, against what the model itself computes from them."""

from collections import Counter

import pytest
import torch

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import extend, register_extension
from dga_scale.backbone.layers import freeze, learning_rate_scales, parameter_layers
from dga_scale.errors import UserError
from tests.helpers.tiny_models import TINY, batch

every_architecture = pytest.mark.parametrize("name", TINY)


@every_architecture
def test_a_parameter_changes_hidden_states_from_its_depth_on(name: str):
    """Gradients of the embedding output (state 0) and of each block's output (states 1 to L)."""
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    depths = parameter_layers(model, anatomy)
    parameters = dict(model.named_parameters())
    assert depths.keys() == parameters.keys()
    assert set(depths.values()) == {0, 1, 2, 3}
    outputs = model(**batch(), output_hidden_states=True)
    states = [*outputs.hidden_states[: anatomy.num_layers], outputs.logits]
    for depth, state in enumerate(states):
        target = (state * torch.randn_like(state)).sum()
        gradients = torch.autograd.grad(
            target, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for (parameter, own), gradient in zip(depths.items(), gradients, strict=True):
            reached = gradient is not None and bool((gradient != 0).any())
            if depth < min(own, anatomy.num_layers):
                assert not reached, f"{parameter} of depth {own} changes state {depth}"
            if depth == own and parameter.endswith("weight") and own > 0:
                assert reached, f"{parameter} of depth {own} leaves state {depth} as it is"


@every_architecture
def test_embeddings_and_blocks_are_told_apart(name: str):
    model = TINY[name].model()
    anatomy = anatomy_of(model)
    depths = parameter_layers(model, anatomy)
    embedding = model.get_input_embeddings().weight
    (embedding_name,) = [n for n, p in model.named_parameters() if p is embedding]
    assert depths[embedding_name] == 0
    counts = Counter(depths.values())
    # The blocks are alike, but for DeBERTa's convolution and ModernBERT's first norm.
    if name not in ("deberta-v3", "modernbert", "modernbert with biases"):
        assert counts[1] == counts[2]
    assert all(depths[n] == 3 for n in anatomy.lm_head_parameters)


def test_final_norms_and_relative_positions():
    expected = {
        "xlm-roberta-xl": {"roberta.encoder.LayerNorm.weight": 3},
        "modernbert": {
            "model.final_norm.weight": 3,
            "model.embeddings.norm.weight": 0,
            "head.dense.weight": 3,
        },
        "gpt2": {"transformer.ln_f.weight": 3, "transformer.wpe.weight": 0},
        "llama": {"model.norm.weight": 3, "lm_head.weight": 3},
        "electra": {"electra.embeddings_project.weight": 0, "generator_predictions.dense.weight": 3},
        "deberta-v3": {
            "deberta.encoder.rel_embeddings.weight": 0,
            "deberta.encoder.LayerNorm.weight": 0,
            "deberta.encoder.conv.conv.weight": 1,
        },
        "opt": {"model.decoder.final_layer_norm.weight": 3, "model.decoder.embed_positions.weight": 0},
        "opt narrow": {"model.decoder.project_out.weight": 3, "model.decoder.project_in.weight": 0},
        "mpnet": {"mpnet.encoder.relative_attention_bias.weight": 0, "lm_head.dense.weight": 3},
        "albert": {"albert.encoder.embedding_hidden_mapping_in.weight": 0, "predictions.dense.weight": 3},
        "xlm-roberta": {"lm_head.decoder.weight": 0, "lm_head.dense.weight": 3},  # the first is tied
    }
    for name, values in expected.items():
        model = TINY[name].model()
        depths = parameter_layers(model, anatomy_of(model))
        assert {parameter: depths[parameter] for parameter in values} == values


def test_learning_rates_fall_from_the_head_down():
    model = TINY["bert"].model()
    scales = learning_rate_scales(model, anatomy_of(model), 0.5)
    assert scales["cls.predictions.transform.dense.weight"] == 1
    assert scales["bert.encoder.layer.1.output.dense.bias"] == 0.5
    assert scales["bert.encoder.layer.0.attention.self.query.weight"] == 0.25
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.125
    assert set(learning_rate_scales(model, anatomy_of(model), 1.0).values()) == {1.0}


@pytest.mark.parametrize(
    ("layers", "embeddings", "still"), [(0, False, {0, 1, 2, 3}), (1, False, {0, 2, 3}), (2, True, {3})]
)
def test_freezing_leaves_the_rest_to_train(layers: int, embeddings: bool, still: set[int]):
    model = TINY["roberta"].model()
    anatomy = anatomy_of(model)
    depths = parameter_layers(model, anatomy)
    frozen = freeze(model, anatomy, layers, embeddings)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {depths[name] for name in training} == still
    assert sorted([*frozen, *training]) == sorted(depths)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).logits.square().mean().backward()
    optimizer.step()
    for name in frozen:
        assert torch.equal(model.get_parameter(name), before[name])
    assert not torch.equal(model.get_parameter("lm_head.dense.weight"), before["lm_head.dense.weight"])


def test_more_layers_than_there_are_can_not_be_frozen():
    model = TINY["bert"].model()
    with pytest.raises(UserError, match="--freeze_layers 3: the model has 2 layers"):
        freeze(model, anatomy_of(model), 3, False)


def test_what_an_extension_adds_has_the_depth_of_its_place():
    def add_scale(base, anatomy, settings):
        base.get_submodule(anatomy.ffn_outputs[1]).extra = torch.nn.Linear(2, 2)

    register_extension("scale of a test", add_scale)
    model = extend(TINY["bert"].model(), "scale of a test", {})
    depths = parameter_layers(model, anatomy_of(model))
    assert depths["base.bert.encoder.layer.1.output.dense.extra.weight"] == 2
    assert depths["base.bert.embeddings.word_embeddings.weight"] == 0
    assert depths["base.cls.predictions.bias"] == 3
