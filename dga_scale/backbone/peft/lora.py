"""LoRA (Hu et al., arXiv 2106.09685) through ``peft``: injected, described beside the model, and merged.

``peft`` is imported where it is used: it takes seconds, and most runs don't need it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.config.declaration import AT_LEAST_1
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import read_object
from dga_scale.storage.typed_json import check_fields

FOLDER = "adapter"
"""Of the adapter in ``peft``'s own format, inside the model's folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = {"lora_alpha": float, "r": Annotated[int, AT_LEAST_1], "fan_in_fan_out": bool}
"""The fields of ``peft``'s config that an export needs."""
_NAME = "default"
_BASE = ".base_layer"


def inject_lora(
    lm: PreTrainedModel,
    anatomy: Anatomy,
    *,
    roles: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    base_name: str | None = None,
) -> None:
    """Add low-rank matrices to projections of a model, and freeze all else.

    ``W x`` becomes ``W x + (alpha / rank) B A dropout(x)``, A random and B zero: the output is the model's
    own until B is trained.

    Args:
        lm: The model.
        anatomy: The anatomy of the model.
        roles: The roles of the projections, see ``unit_kinds.Role``; a module of several roles is adapted as
            a whole.
        rank: The rank of the matrices.
        alpha: The scale, see above.
        dropout: The dropout probability.
        base_name: The name of the model that the adapter is loaded onto, for its config.

    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = {projection.module for projection in anatomy.projections if projection.role in roles}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # documented as an int, used as a number
        lora_dropout=dropout,
        target_modules=sorted(targets),
        fan_in_fan_out=all(isinstance(lm.get_submodule(name), Conv1D) for name in targets),
        base_model_name_or_path=base_name,
    )
    inject_adapter_in_model(config, lm, _NAME)  # freezes all other parameters


def save_lora_config(lm: PreTrainedModel, folder: Path) -> None:
    """Write the description for ``LoraWeights`` into a model's folder; nothing for a model without LoRA."""
    if config := getattr(lm, "peft_config", {}).get(_NAME):
        config.save_pretrained(folder / FOLDER)


@dataclass(frozen=True)
class LoraWeights:
    """The weights of a model with LoRA, as those of the plain model and as ``peft``'s adapter.

    Attributes:
        scaling: The factor ``alpha / rank``.
        transposed: Whether the model stores its weights as (inputs, outputs), as GPT-2 does.

    """

    scaling: float
    transposed: bool

    @classmethod
    def described_in(cls, folder: Path) -> "LoraWeights | None":
        """Read what ``save_lora_config`` wrote; None where it wrote nothing."""
        path = folder / FOLDER / CONFIG
        if not path.exists():
            return None
        config = read_object(path)
        try:
            check_fields(config, _READ, needed=True)
        except ValueError as error:
            raise UserError(f"damaged ({error}). Restore it, or export another checkpoint", path) from error
        return cls(config["lora_alpha"] / config["r"], config["fan_in_fan_out"])

    @staticmethod
    def plain_names(stored: Iterable[str]) -> dict[str, str]:
        """Name the weights of the plain model: for each, the name that it is stored under."""
        return {name.replace(f"{_BASE}.", "."): name for name in stored if not _is_low_rank(name)}

    @staticmethod
    def adapter_names(stored: Iterable[str]) -> dict[str, str]:
        """Name the weights of ``peft``'s file: for each, the name that it is stored under."""
        return {
            f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": name
            for name in stored
            if _is_low_rank(name)
        }

    def merged(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Compute a weight of the plain model: ``W + scaling B A`` in the stored precision.

        Args:
            name: The name, as stored.
            read: The function that returns a stored weight by its name.

        """
        weight = read(name)
        module, _, leaf = name.rpartition(".")
        if not module.endswith(_BASE) or leaf != "weight":
            return weight
        module = module.removesuffix(_BASE)
        delta = read(f"{module}.lora_B.{_NAME}.weight") @ read(f"{module}.lora_A.{_NAME}.weight")
        return weight + self.scaling * (delta.T if self.transposed else delta)


def _is_low_rank(name: str) -> bool:
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name
