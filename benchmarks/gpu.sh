#!/usr/bin/env bash
# Training on one GPU, measured in one command, without a network and in under 8 minutes:
#
#     benchmarks/gpu.sh                        the section goes to benchmarks/RESULTS.md
#     OUT=/some/folder benchmarks/gpu.sh       ... to that Markdown file, or gpu.md in that folder
#     WHEELS=/folder/of/wheels benchmarks/gpu.sh       installs what is missing from there, into a temporary folder
#     benchmarks/gpu.sh --shapes roberta-large --attn_implementation flash_attention_2
#     benchmarks/gpu.sh --smoke                tiny shapes, on a CPU too
#
# PYTHON names the interpreter (default: .venv/bin/python where there is one, else python3). It needs PyTorch
# that sees the GPU, and the packages below; dga_scale itself need not be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
        --target "$temporary/site" "$WHEELS"/*.whl
    export PYTHONPATH=$temporary/site${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" - "$@" <<'PYTHON'
"""Say what is missing, and how to get it."""
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pip._vendor.packaging.requirements import Requirement

wanted = ["torch>=2.8", "deepspeed>=0.19.8,<0.20", "transformers>=5.17,<6", "accelerate>=1.1", "datasets>=4,<6",
          "tensorboard", "matplotlib", "rich", "pyyaml", "psutil", "zstandard", "scikit-learn", "scipy", "peft"]
direct, missing, seen = len(wanted), [], set()
for number, text in enumerate(wanted):  # grows: what those need is looked for too, in any version
    requirement = Requirement(text)
    if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    seen.add(requirement.name)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        missing.append(f"{requirement.name}{requirement.specifier}")
        continue
    if number < direct and not requirement.specifier.contains(found, prereleases=True):
        missing.append(f"{requirement.name}{requirement.specifier} (there is {found})")
    if requirement.name != "torch":
        wanted += requires(requirement.name) or []
if any(name.startswith("deepspeed") for name in missing):  # what it needs can't be read yet
    for name in ("einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "pydantic", "tqdm"):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
if missing:
    names = [repr(name.split(" ")[0]) for name in missing]
    upon_torch = [name for name in names if name[1:].startswith(("torch", "transformers", "accelerate", "peft"))]
    others = [name for name in names if name not in upon_torch and not name[1:].startswith("deepspeed")]
    download = f"    pip download --only-binary=:all: --python-version {sys.version_info[0]}.{sys.version_info[1]} -d WHEELS"
    commands = [f"{download} {' '.join(others)}"] if others else []
    commands += [f"{download} --no-deps {' '.join(upon_torch)}"] if upon_torch else []
    if any(name[1:].startswith("deepspeed") for name in names):
        commands.append("    DS_BUILD_OPS=0 pip wheel --no-deps -w WHEELS 'deepspeed>=0.19.8,<0.20'")
    sys.exit("\n".join([
        f"missing for {sys.executable}: {', '.join(missing)}",
        "Where there is a network: pip install them. Otherwise make a folder of wheels where there is one,",
        *commands,
        "and give it as WHEELS=FOLDER. What is installed here already need not stay in it.",
    ]))
import torch
if not torch.cuda.is_available() and "--smoke" not in sys.argv:
    sys.exit(f"torch {torch.__version__} sees no GPU. --smoke tries the benchmark on a CPU")
PYTHON
exec_options=()
[[ -n ${OUT:-} ]] && exec_options=(--output "$OUT")
"$PYTHON" -m benchmarks.gpu "${exec_options[@]}" "$@"
