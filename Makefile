PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= results/demo
SEEDS ?= 0
WORKERS ?= 0

STRATEGIES = sequential,lora,model_grafting,model_tailor,svd_quant,graftllm,graftllm_adaptive,individual

.PHONY: demo test test-fast check docs env

# The strategies on the embedded scenario. The model writes programs there, and they are run in the sandbox.
demo: env
	$(BIN)/cl-graft sweep --scenarios mini --strategies $(STRATEGIES) --seeds $(SEEDS) \
	  --set 'lora.convention=["trained_on","each"]' \
	  --workers $(WORKERS) --out $(OUT) --allow-code-execution

test: env check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The documentation as a site, in build/site; nothing in it is fetched from elsewhere.
docs: env
	$(BIN)/python -m mkdocs build --strict

env: $(VENV)/.complete

$(VENV)/.complete: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
