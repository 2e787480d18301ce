PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= results/demo
SEEDS ?= 0
WORKERS ?= 0

# Python compiles what it imports, which is a small part of what is installed; once, where it may keep that.
unexport PYTHONDONTWRITEBYTECODE
QUICK = --quiet --disable-pip-version-check --no-compile
# the slowest first: two run at a time
STRATEGIES = model_grafting,sequential,lora,model_tailor,svd_quant,graftllm,graftllm_adaptive,individual

.PHONY: demo test test-fast check docs readme env oldest

# The strategies on math, then code, of the embedded scenario. The model writes programs there, which run in the sandbox.
demo: env
	$(BIN)/cl-graft sweep --scenarios mini --strategies $(STRATEGIES) --seeds $(SEEDS) \
	  --set 'mini.tasks="math,code"' --set 'lora.convention=["trained_on","each"]' --set model_grafting.epochs=12 \
	  --workers $(WORKERS) --out $(OUT) --allow-code-execution
	@echo 'All three tasks, and masks of 36 epochs: the same without mini.tasks and model_grafting.epochs. A real language model, SmolLM2, on data of your own:'
	@echo '  $(BIN)/cl-graft models fetch smollm2-135m'
	@echo '  $(BIN)/cl-graft sweep --strategies individual,graftllm --seeds 0 --data-dir DATA results/published/real/classification.yaml'
	@echo 'That takes an hour or so of a core; DATA holds cl_benchmark/, as docs/streams.md says.'

# Three workers, on two cores too: tests of what is killed, lost or stopped wait more than they compute.
test: env check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The documentation as a site, in build/site; nothing in it is fetched from elsewhere.
docs: env
	$(BIN)/python -m mkdocs build --strict

# What is known of each strategy, and what was measured, into README's tables.
readme: env
	$(BIN)/python -m tests.strategies_table
	$(BIN)/python -m tests.published_table

env: $(VENV)/.complete

ifeq ($(abspath $(VENV)),$(abspath .venv))
$(VENV)/.complete: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUICK) torch==2.13.0
	$(BIN)/python -m pip install $(QUICK) --no-deps -r requirements.lock
	$(BIN)/python -m pip install $(QUICK) --no-deps --editable .
	touch $@
else
# An environment that is there already, as `make env VENV=$$VIRTUAL_ENV`: its torch and torchvision stay as they are.
$(VENV)/.complete: pyproject.toml
	mkdir -p build
	$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | grep -iE '^torch(vision)?==' > build/kept.txt || true
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c build/kept.txt --editable '.[dev]'
	touch $@
endif

# The oldest versions that pyproject.toml allows, in an environment of their own, and the fast tests there.
OLDEST = build/oldest
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(shell grep '^torch==' requirements-oldest.txt)
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt pytest pytest-xdist pytest-timeout hypothesis \
	  scikit-learn torchmetrics gdown qpsolvers dill gputil pandas
	$(OLDEST)/bin/python -m pip install --quiet --no-deps avalanche-lib==0.6.0 pytorchcv==0.0.74 torchvision==0.16.2
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"
