"""Read a model's folder tensor by tensor: names, shapes and dtypes without the weights."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from dga_scale.backbone.loading import ModelConfig, load_model_config
from dga_scale.backbone.tied import tied_names
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.storage.hub import local_only

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
          "BOOL": torch.bool}  # fmt: skip
_RENAMED = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),  # checkpoints of the first BERTs
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embed_out\.", "lm_head."),  # GPT-NeoX
)
"""The patterns of parameter names in old files, with the names that transformers gives them today."""
_NEEDED_OF_THE_HUB = ["config.json", "model*.safetensors*", "*token*", "vocab*", "merges.txt", "*.model"]


@dataclass(frozen=True)
class StoredTensor:
    """The file, name, shape and dtype of a stored tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder of a masked or causal LM, whose weights are not in memory."""

    name: str
    """The name as the user wrote it."""
    path: Path
    settings: ModelConfig

    @classmethod
    def open(cls, name: str) -> "ModelFolder":
        """Open a folder, or a model of the Hugging Face hub, which is downloaded if it is not cached.

        Raises:
            UserError: There is no model, its architecture is unknown, or its weights are pickled.
        """
        settings = load_model_config(name)
        path = Path(name)
        if not path.is_dir():
            fetched = snapshot_download(
                name, allow_patterns=_NEEDED_OF_THE_HUB, local_files_only=local_only(name)
            )
            path = Path(fetched)
        if not any(path.glob("model*.safetensors")):
            raise UserError(
                "no safetensors in it (model.safetensors, or model-00001-of-...): pickled weights can run "
                "code hidden in them and are not read. Where you trust it, load it once with transformers "
                "and save_pretrained it into a new folder.",
                name,
            )
        return cls(name, path, settings)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights."""
        return load_tokenizer(self.name)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors in the folder, by the names that transformers gives them today."""
        found: dict[str, StoredTensor] = {}
        for file in sorted(self.path.glob("model*.safetensors")):
            for name, stored in self._tensors_of(file).items():
                for pattern, today in _RENAMED:
                    name = re.sub(pattern, today, name)
                found[name] = stored
        return found

    def find(self, names: list[str]) -> StoredTensor | None:
        """Find a tensor by any of its names; checkpoints of a bare trunk omit the trunk's name."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        for name in names:
            if (short := name.partition(".")[2]) in self.tensors:
                return self.tensors[short]
        return None

    def tensor_names(self) -> list[list[str]]:
        """Return the names of each tensor of the config's model; tied weights have several names."""
        auto: Any = AutoModelForCausalLM if self.settings.causal else AutoModelForMaskedLM
        with torch.device("meta"):
            model = auto.from_config(self.settings.config)
            model.tie_weights()
        return tied_names(model)

    @staticmethod
    def read(stored: StoredTensor) -> Tensor:
        """Read one tensor."""
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
        return tensor

    def _tensors_of(self, file: Path) -> dict[str, StoredTensor]:
        try:
            with safe_open(file, framework="pt") as handle:
                found = {}
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    stored = handle.get_slice(name)
                    dtype = self._dtype(stored.get_dtype(), name)
                    found[name] = StoredTensor(file, name, tuple(stored.get_shape()), dtype)
                return found
        except (SafetensorError, OSError) as error:
            raise UserError(f"damaged ({error}). Copy or download it again.", file) from None

    def _dtype(self, stored: str, name: str) -> torch.dtype:
        if stored not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"{name} is stored as {stored}; known are {known}. Merge the weights before they are "
                "quantised.",
                self.name,
            )
        return DTYPES[stored]
