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
if missing:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    plain = [name.split(" ")[0] for name in missing if not name.startswith("deepspeed")]
    sys.exit(
        f"missing for {sys.executable}: {', '.join(missing)}\n"
        "Where there is a network: pip install them. Otherwise make a folder of wheels where there is one, with\n"
        f"    pip download --only-binary=:all: --python-version {here} --no-deps -d WHEELS {' '.join(map(repr, plain))}\n"
        "    DS_BUILD_OPS=0 pip wheel --no-deps -w WHEELS 'deepspeed>=0.19.8,<0.20'\n"
        "and give it as WHEELS=FOLDER; what those need in turn is asked for then."
    )
import torch
if not torch.cuda.is_available() and "--smoke" not in sys.argv:
    sys.exit(f"torch {torch.__version__} sees no GPU. --smoke tries the benchmark on a CPU")
PYTHON
exec_options=()
[[ -n ${OUT:-} ]] && exec_options=(--output "$OUT")
"$PYTHON" -m benchmarks.gpu "${exec_options[@]}" "$@"
