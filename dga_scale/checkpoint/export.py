"""Export a run's checkpoint as a Hugging Face model folder, tensor by tensor."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from dga_scale.backbone.checks import all_finite
from dga_scale.backbone.extended import model_class
from dga_scale.backbone.peft.lora import FOLDER, WEIGHTS, LoraWeights
from dga_scale.backbone.tied import tied_names
from dga_scale.checkpoint.model_card import model_card
from dga_scale.checkpoint.state import MODEL
from dga_scale.checkpoint.store import Checkpoint, checkpoint_path, newest_verified, verified
from dga_scale.errors import UserError
from dga_scale.launch.world import single_process
from dga_scale.run_folder import RunFolder, new_folder, write_text
from dga_scale.storage.safetensors_stream import Entry, SegmentReader, write_model_files, write_safetensors

WEIGHT = "weight:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def consolidate(run_dir: Path, step: int | None, output: Path, dtype: str = "float32") -> Path:
    """Write safetensors, configuration, tokenizer and a model card that ``from_pretrained`` loads.

    The weights are those that the optimizer steps, in fp32 whatever the precision of the forward passes.
    Exporting takes the memory of the largest tensor, twice.

    Args:
        run_dir: The run's folder.
        step: The checkpoint's step; None takes the newest complete one.
        output: The folder to be written, which appears whole or not at all.
        dtype: "float32" or "bfloat16".

    Raises:
        UserError: There is no such checkpoint, it is damaged (the message names the file), ``output`` exists,
            or the disk is full; a weight is a NaN or infinity.

    """
    checkpoint = _chosen(run_dir, step)
    with new_folder(output) as folder, SegmentReader(checkpoint.shards) as reader:
        shutil.copytree(checkpoint.path / MODEL, folder)
        _write_weights(folder, reader, dtype)
        write_text(folder / "README.md", model_card(run_dir, checkpoint.step, folder / "config.json"))
    return output


def _chosen(run_dir: Path, step: int | None) -> Checkpoint:
    if step is None:
        found = newest_verified(run_dir, single_process())
        if found is None:
            raise UserError("no checkpoint in it. Give the folder of a run (its --output_dir).", run_dir)
        return found
    found, problem = verified(checkpoint_path(run_dir, step), single_process())
    if found is None:
        there = ", ".join(path.name for path in sorted(RunFolder(run_dir).checkpoints.glob("step-*[0-9]")))
        raise UserError(f"--step {step}: {problem}. The run holds {there or 'no checkpoints'}.")
    return found


def _write_weights(folder: Path, reader: SegmentReader, dtype: str) -> None:
    """Write the weights as ``dtype``, and name it in the config."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")

    names = [key.removeprefix(WEIGHT) for key in reader.stored if key.startswith(WEIGHT)]
    lora = LoraWeights.described_in(folder)
    stored = lora.plain_names(names) if lora else {name: name for name in names}

    def read(name: str) -> Tensor:
        return reader.full(f"{WEIGHT}{name}")

    def entry(name: str, source: str, parameter: bool) -> Entry:
        # What a module counts or averages is not rounded.
        kept = DTYPES[dtype] if parameter else torch.float32
        shape = reader.stored[f"{WEIGHT}{source}"].shape

        def values() -> Tensor:
            found = lora.merged(source, read) if lora else read(source)
            if parameter and not all_finite(found):
                raise UserError(
                    f"{name} holds a NaN or infinity in the checkpoint: no model is written of it. Give an "
                    "older step, and train on from there with a lower --learning_rate"
                )
            return found

        return Entry(name, kept, shape, values)

    tensors = _tensors(folder, stored)
    write_model_files(folder, [entry(name, stored[name], parameter) for name, parameter in tensors])
    if lora:
        own = [entry(name, source, True) for name, source in lora.adapter_names(names).items()]
        write_safetensors(folder / FOLDER / WEIGHTS, own, {"format": "pt"})


def _tensors(folder: Path, stored: Collection[str]) -> list[tuple[str, bool]]:
    """List the model's tensors in their order, and whether each is a parameter; tied weights come once."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = model_class(config.architectures[0])(config)
        model.tie_weights()
    buffers = {name for name, _ in model.named_buffers()}
    tensors = []
    for group in tied_names(model):
        kept = next((name for name in group if name in stored), None)
        assert kept is not None, f"the checkpoint holds no {group[0]}"
        tensors.append((kept, kept not in buffers))
    return tensors
