"""Merge a base model and models adapted from it, tensor by tensor.

mergekit 0.1.5 installs beside these versions of torch and transformers, but refuses the masked LMs that they
save (its table of BERT requires a pooler, which a masked LM lacks), and merges onto the disk only, whereas a
sweep merges in memory; hence the own implementation of the three formulas.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dga_scale
from dga_scale.corpus.tokenizer import tokenizer_hash
from dga_scale.errors import UserError
from dga_scale.merging.folders import ModelFolder, StoredTensor
from dga_scale.merging.formulas import merge_tensors
from dga_scale.merging.settings import MergeSettings
from dga_scale.run_folder import new_folder, write_text
from dga_scale.storage.safetensors_stream import Entry, write_model_files

_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "README.md", ".*")


@dataclass(frozen=True)
class MergedTensor:
    """A tensor that every model has."""

    names: list[str]
    """The tensor's names, several for tied weights; it is stored under the first one."""
    base: StoredTensor
    models: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the inputs, so that the ends of a sweep are the inputs bit for bit."""
        return reduce(torch.promote_types, (stored.dtype for stored in (self.base, *self.models)))

    def merged(self, settings: MergeSettings) -> Tensor:
        """Read the tensor from every model and merge; integers (position ids) are the adapted model's."""
        models = [ModelFolder.read(stored) for stored in self.models]
        if not self.dtype.is_floating_point:
            return models[0]
        return merge_tensors(ModelFolder.read(self.base), models, settings).to(self.dtype)


class Merge:
    """A base and the models adapted from it, checked to fit together.

    Raises:
        UserError: They differ in architecture, in a tensor's name or shape, or in their tokenizer; or SLERP
            is given more than one adapted model.
    """

    def __init__(self, base: ModelFolder, models: Sequence[ModelFolder], method: str) -> None:
        if method == "slerp" and len(models) != 1:
            raise UserError(f"--method slerp merges one model with the base, --model names {len(models)}.")
        self.base, self.models = base, tuple(models)
        for model in models:
            self._check_alike(model)
        self.tensors = tuple(self._tensors())

    def load_into(self, model: PreTrainedModel, settings: MergeSettings) -> None:
        """Overwrite the weights of a loaded model, with one tensor of each input in memory at a time."""
        state = model.state_dict()
        with torch.no_grad():
            for tensor in self.tensors:
                state[tensor.names[0]].copy_(tensor.merged(settings))

    def write(self, settings: MergeSettings, output: Path) -> None:
        """Write a model folder, whole or not at all, with one tensor of each input in memory at a time.

        Configuration and tokenizer are copied from the first adapted model.

        Raises:
            UserError: ``output`` exists already, or the disk is full.
        """
        with new_folder(output) as folder:
            # symlinks=False: the hub's cache holds links
            shutil.copytree(self.models[0].path, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED))
            write_model_files(folder, [_entry(tensor, settings) for tensor in self.tensors])
            self._write_config(folder)
            write_text(folder / "README.md", self._card(settings))

    def _check_alike(self, model: ModelFolder) -> None:
        ours, theirs = (folder.settings.config.model_type for folder in (self.base, model))
        if ours != theirs:
            raise UserError(
                f"--model {model.name} is a {theirs} model, --base {self.base.name} a {ours} model. Only "
                "models adapted from one base can be merged with it."
            )
        if tokenizer_hash(model.tokenizer) != tokenizer_hash(self.base.tokenizer):
            raise UserError(
                f"--model {model.name} has another tokenizer than --base {self.base.name}: rows of their "
                "embeddings stand for other tokens. Give the base that the model was adapted from."
            )

    def _tensors(self) -> Iterator[MergedTensor]:
        for names in self.models[0].tensor_names():
            base = _found(self.base, names)
            models = tuple(_found(model, names) for model in self.models)
            for folder, stored in zip(self.models, models, strict=True):
                if stored.shape != base.shape:
                    raise UserError(
                        f"{names[0]} is {base.shape} in --base {self.base.name} and {stored.shape} in "
                        f"--model {folder.name}. Only models adapted from one base can be merged with it."
                    )
            kept = next((name for name in names if name in self.models[0].tensors), names[0])
            yield MergedTensor([kept, *(name for name in names if name != kept)], base, models)

    def _write_config(self, folder: Path) -> None:
        floating = [tensor.dtype for tensor in self.tensors if tensor.dtype.is_floating_point]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(reduce(torch.promote_types, floating)).removeprefix("torch.")
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _card(self, settings: MergeSettings) -> str:
        base, *models = (_public_name(folder) for folder in (self.base, *self.models))
        how = f"{settings.method}, weight {settings.weight:g}"
        if settings.method == "ties":
            how += f", density {settings.density:g}"
        ends = f"0: {base}; 1: {' and '.join(models)}"
        lines = [
            "---",
            "library_name: transformers",
            "tags: [merge, domain-adaptation]",
            "---",
            f"# {' and '.join(models)} merged with {base}",
            "",
            f"{how} ({ends}), arithmetic in fp32, by dga_scale {dga_scale.__version__}.",
            "",
        ]
        return "\n".join(lines)


def _found(folder: ModelFolder, names: list[str]) -> StoredTensor:
    stored = folder.find(names)
    if stored is None and folder.settings.config.model_type == "nomic_bert":
        raise UserError(
            f"model {folder.name} is a nomic_bert model, whose files hold other tensors than transformers "
            "computes with, and merging works on files. Merge models of another architecture"
        )
    if stored is None:
        raise UserError(
            f"model {folder.name} has no tensor {' or '.join(names)}. Only models of one architecture with "
            "their LM head can be merged; if it is a checkpoint of an older transformers, load it once and "
            "save_pretrained it."
        )
    return stored


def _entry(tensor: MergedTensor, settings: MergeSettings) -> Entry:
    return Entry(tensor.names[0], tensor.dtype, tensor.models[0].shape, lambda: tensor.merged(settings))


def _public_name(folder: ModelFolder) -> str:
    """Return a hub name as it is, of a folder only its or its run's name: the card must not leak paths."""
    if not Path(folder.name).exists():
        return folder.name
    path = folder.path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
