"""The performance of a GPU, its links and its host: a small table, or a YAML file with the same names."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from dga_scale.config.arguments import nearest
from dga_scale.config.declaration import shown
from dga_scale.config.yaml_file import read_yaml
from dga_scale.errors import GivenPath, UserError, naming_flags


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU in its machine; bandwidths are in GB/s (1e9 bytes) in one direction.

    Attributes:
        memory_gib: The memory that the driver shows.
        bf16_tflops: The peak of dense bf16 matrix products, by the maker's data sheet.
        fp32_tflops: The same in fp32, without TF32, which is PyTorch's default.
        memory_gbs: The bandwidth of the GPU's own memory.
        intra_node_gbs: The bandwidth to the GPUs of the same machine (NVLink).
        inter_node_gbs: The bandwidth to other machines for each GPU: its network card, or its share of one.
        reserved_gib: The memory for context, communication buffers, and the allocator's fragmentation.
        product_efficiency: The share of the peak that matrix products reach.
        memory_efficiency: The share of the memory's bandwidth that all other kernels reach.
        mfu: The measured MFU of forward and backward passes; it replaces the last two.
        link_efficiency: The share of the links' bandwidth that collectives reach.
        overlap: The share of the compute time with which communication can overlap.
        host_link_gbs: The bandwidth between GPU and host (PCIe), for offload.
        host_memory_gbs: Each GPU's share of the bandwidth of the host's memory.
        host_memory_gib: Each GPU's share of the host's memory.
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
"""The known GPUs, by NVIDIA's data sheets: SXM modules in machines of 8, 200 (A100) or 400 Gb/s a GPU.

The efficiencies and ``overlap`` are assumptions; the log of a run has the MFU that it reached as ``mfu``.
"""

_SHARES = ("product_efficiency", "memory_efficiency", "mfu", "link_efficiency", "overlap")


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, or read a YAML file of ``Gpu``'s fields.

    Raises:
        UserError: The GPU is unknown (the nearest name is given), the file can't be read, or a figure is
            unknown, missing or impossible.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--gpu {name}: not known (known: {', '.join(GPUS)}).{nearest(name.lower(), GPUS)} Describe "
            f"another one in a YAML file: {', '.join(f.name for f in fields(Gpu) if f.default is MISSING)}"
        )
    with naming_flags([GivenPath("--gpu", name, name)]):
        content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"--gpu {name} holds no figures. Write one `name: number` a line")
    known = [f.name for f in fields(Gpu)]
    for key, value in content.items():
        where = f"{name}:{lines[(key,)]}"
        if key not in known:
            raise UserError(f"{where}: unknown figure {key!r}.{nearest(str(key), known)}")
        least = 0 if key == "overlap" else 1e-9  # a machine may hide nothing
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value < 1e300:
            raise UserError(f"{where}: {key} is {shown(value)}, and must be a number above 0")
        if key in _SHARES and value > 1:
            raise UserError(f"{where}: {key} is {value}, and must be a share from 0 to 1")
    missing = [f.name for f in fields(Gpu) if f.default is MISSING and f.name not in content]
    if missing:
        raise UserError(f"{name}: {', '.join(missing)} missing. Take them from the maker's data sheet")
    return Gpu(**content)
