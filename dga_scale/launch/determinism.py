"""Deterministic computing, so that a run on GPUs repeats another's numbers bit for bit.

On CPUs everything is deterministic as it is. On a GPU some kernels add up in the order in which their threads
come: cuBLAS with several workspaces, the backward passes of attention and embeddings, scatters, NCCL's
reductions inside NVSwitch (NVLS; NVIDIA/nccl issue 1497). Torch has other, slower kernels for most, for its
fused attention too, and refuses the rest.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, cast

import torch

from dga_scale.errors import UserError

ATTENTION = ("sdpa", "eager", "flash_attention_2")
"""The attention implementations that can compute deterministically."""
_CUBLAS, _CUBLAS_VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The variable that fixes cuBLAS's workspaces, and the values with which it is deterministic."""
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Compute deterministically inside the context, if ``wanted``.

    To be entered before the process group is there: cuBLAS and NCCL read the environment when they start, and
    keep it.

    Raises:
        UserError: An operation without a deterministic implementation was called; it is named.

    """
    if not wanted:
        yield
        return
    if os.environ.get(_CUBLAS) not in _CUBLAS_VALUES:
        os.environ[_CUBLAS] = _CUBLAS_VALUES[0]
    os.environ.setdefault("NCCL_ALGO", "^NVLS")  # another choice is the user's own
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # which transformers reads
    cudnn, utilities = torch.backends.cudnn, cast("Any", torch.utils.deterministic)
    before = cudnn.deterministic, cudnn.benchmark, utilities.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    utilities.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
    try:
        yield
    except RuntimeError as error:
        if not (refused := _REFUSED.match(str(error))):
            raise
        raise UserError(
            f"--deterministic true: torch has no deterministic implementation of {refused[1]} on this "
            "device. Leave the flag out: the numbers then differ from run to run by their rounding"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was)
        cudnn.deterministic, cudnn.benchmark, utilities.fill_uninitialized_memory = before


def check_attention(implementation: str | None) -> None:
    """Refuse an attention implementation that may not be deterministic; None, the default, is.

    Raises:
        UserError: It may not be.

    """
    if implementation not in (None, *ATTENTION):
        raise UserError(
            f"--deterministic true: --attn_implementation {implementation} is not known to compute "
            f"deterministically. Choose one of {', '.join(ATTENTION)}, or leave one of the two flags out"
        )
