"""What a GPU, its links and its host can do: a small table, or a YAML file with the same names."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import yaml

from dga_scale.config.arguments import nearest
from dga_scale.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU in its machine. Bandwidths are GB/s (1e9 bytes) in one direction.

    Attributes:
        memory_gib: that the driver shows.
        bf16_tflops, fp32_tflops: peak of dense matrix products, by the maker's data sheet. PyTorch multiplies
            float32 without TF32 unless told otherwise.
        memory_gbs: of the GPU's own memory.
        intra_node_gbs: to the GPUs of the same machine (NVLink).
        inter_node_gbs: to other machines, for each GPU: its own network card, or its share of a common one.
        reserved_gib: context, communication buffers, and what the allocator loses in fragments.
        product_efficiency: share of the peak that matrix products reach.
        memory_efficiency: share of the memory's bandwidth that all other kernels reach.
        mfu: of forward and backward passes, where it was measured: counts in place of the last two.
        link_efficiency: share of the links' figures that collectives reach.
        overlap: share of the time of a pass behind which communication can hide, where DeepSpeed overlaps.
        host_link_gbs: between GPU and host (PCIe), for offload.
        host_memory_gbs: bandwidth of the host's memory, for each GPU: its share.
        host_memory_gib: for each GPU: its share.

    """

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gbs: float
    intra_node_gbs: float
    inter_node_gbs: float
    reserved_gib: float = 3.0
    product_efficiency: float = 0.7
    memory_efficiency: float = 0.8
    mfu: float | None = None
    link_efficiency: float = 0.8
    overlap: float = 0.7
    host_link_gbs: float = 50.0
    host_memory_gbs: float = 30.0
    host_memory_gib: float = 200.0


GPUS = {
    "a100": Gpu(79.1, 312, 19.5, 2039, 300, 25, host_link_gbs=25),
    "a100-40gb": Gpu(39.4, 312, 19.5, 1555, 300, 25, host_link_gbs=25),
    "h100": Gpu(79.1, 989, 67, 3350, 450, 50),
    "h200": Gpu(140.0, 989, 67, 4800, 450, 50),
}
"""SXM modules in machines of 8, by NVIDIA's data sheets: network cards of 200 (A100) and 400 Gb/s a GPU.

The efficiencies are assumptions, as is ``overlap``: what a run reached stands in its log as ``mfu``.
"""

_SHARES = ("product_efficiency", "memory_efficiency", "mfu", "link_efficiency", "overlap")


def find_gpu(name: str) -> Gpu:
    """Look a GPU up by name, or read a YAML file of ``Gpu``'s fields.

    Raises:
        UserError: an unknown GPU (with the nearest name), a file that can't be read, an unknown, missing or
            impossible figure.

    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--gpu {name}: not known (known: {', '.join(GPUS)}).{nearest(name.lower(), GPUS)} Describe "
            f"another one in a YAML file: {', '.join(f.name for f in fields(Gpu) if f.default is MISSING)}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--gpu {name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--gpu {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--gpu {name} holds no figures. Write one `name: number` a line")
    known = [f.name for f in fields(Gpu)]
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{name}: unknown figure {key!r}.{nearest(str(key), known)}")
        least = 0 if key == "overlap" else 1e-9  # a machine may hide nothing
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
            raise UserError(f"{name}: {key} is {value!r}, and must be a number above 0")
        if key in _SHARES and value > 1:
            raise UserError(f"{name}: {key} is {value}, and must be a share from 0 to 1")
    missing = [f.name for f in fields(Gpu) if f.default is MISSING and f.name not in content]
    if missing:
        raise UserError(f"{name}: {', '.join(missing)} missing. Look in the maker's data sheet")
    return Gpu(**content)
