# Everything happens in .venv, which the first target makes. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
# Where no GPU is to be seen, torch alone first, so that nothing pulls in another build of it later.
TORCH ?= torch
LOCK := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
UV := .venv-uv/bin/uv

.PHONY: demo test lint docs lock test-latest test-oldest

demo: $(VENV)/.quickstart
	$(BIN)/python tools/demo.py

# Three at a time on two cores: a sixth of the time, tests wait for ranks that start and jobs that are scheduled.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dga_scale launchers tools
	$(BIN)/lint-imports

# The pages that are written from the code.
docs: $(VENV)/.test
	$(BIN)/python -m dga_scale.config.page > docs/settings.md

# The newest versions in the ranges of pyproject.toml, for every Python; to be tested before they are committed.
lock: $(UV)
	$(call compile,$(LOCK),--universal --python-version 3.10)

# The suite at both ends of the ranges, with this Python, each in an environment of its own. Old libraries warn of
# each other, which their newer versions have mended: no error there.
test-latest: $(UV)
	$(call compile,.venv-latest.txt,--python $(PYTHON))
	@$(MAKE) test VENV=.venv-latest LOCK=.venv-latest.txt

test-oldest: $(UV)
	$(call compile,.venv-oldest.txt,--python $(PYTHON) --resolution lowest-direct)
	@$(MAKE) test VENV=.venv-oldest LOCK=.venv-oldest.txt PYTEST_FLAGS="-W ignore"

# Without what torch pins itself, which depends on its build.
define compile
	@$(UV) pip compile pyproject.toml --all-extras --upgrade --quiet --no-annotate --no-emit-index-url \
	  --custom-compile-command 'make $@' --output-file $(1).all $(2)
	@grep -vE '^(cuda|nvidia)-|^triton=' $(1).all >$(1) && rm $(1).all
endef

$(UV):
	@$(PYTHON) -m venv .venv-uv
	@.venv-uv/bin/python -m pip -qq --disable-pip-version-check install 'uv>=0.13,<0.14'

# [quickstart] or [test]; installed again when pyproject.toml or the lock changes.
$(VENV)/.%: pyproject.toml $(LOCK) | $(BIN)/pip
	@echo "installing dga_scale[$*] and what it needs into $(VENV): a few minutes the first time"
	@command -v nvidia-smi >/dev/null || $(PIP) install --constraint $(LOCK) "$(TORCH)"
	@$(PIP) install --constraint $(LOCK) --editable ".[$*]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is missing, or not Python 3.10 to 3.13. Name another: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) can't make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
