# Everything happens in .venv, which the first target makes. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
# Where no GPU is to be seen, torch alone first, so that nothing pulls in another build of it later.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.PHONY: demo test lint

demo: $(VENV)/.quickstart
	$(BIN)/python tools/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dga_scale launchers tools
	$(BIN)/lint-imports

# [quickstart] or [test]; installed again when pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(BIN)/pip
	@echo "installing dga_scale[$*] and what it needs into $(VENV): a few minutes the first time"
	@command -v nvidia-smi >/dev/null || $(PIP) install "$(TORCH)"
	@$(PIP) install --editable ".[$*]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is missing, or not Python 3.10 to 3.13. Name another: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) can't make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
