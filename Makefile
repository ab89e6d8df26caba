# `make tour` and `make test` do all the set-up on a fresh machine: venv, install, run. Nothing else is needed.
#   make tour PYTHON=python3.12     another interpreter
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: tour demo eval test test-browser test-slow bench lint clean nano

tour: $(VENV)/.installed
	$(BIN)/moonkit tour

# the page in the browser, with the model in the box: no network, no account
demo: $(VENV)/.installed
	$(BIN)/moonkit demo

# the model in the box on questions that it has not met, and on two public sets where their data is; minutes
EVAL = runs/eval/nano
eval: $(VENV)/.installed
	$(BIN)/moonkit eval --tasks world,kimi_humaneval,kimi_mnist --skip_missing --limit 164 --out $(EVAL)
	$(BIN)/moonkit eval report $(EVAL)

# files of tests side by side, each process with one thread; those that need a browser skip where there is none
WORKERS ?= auto
test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 4 --dist loadfile

# only the demo in a real Chromium; also makes the pictures of docs/images
test-browser: $(VENV)/.installed-dev
	MOONKIT_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m browser tests/demo

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# the model in the box from nothing; hours. What is done is not done again, what was stopped goes on
RUNS ?= runs
PARTS = run letters anneal spelling moments sharpen finish names settle
nano: $(VENV)/.installed
	@from=""; for part in $(PARTS); do \
	  out=$(RUNS)/nano-$$part; \
	  test -d $$out/model || $(BIN)/moonkit pretrain recipes/nano.py --part $$part $$from --out $$out || exit $$?; \
	  from="--model $$out/model"; \
	done; $(BIN)/moonkit sft recipes/nano.py $$from --out $(RUNS)/nano-sft
	$(BIN)/moonkit score --model $(RUNS)/nano-sft/model

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/moonkit bench

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moonkit needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing moonkit and what it needs (torch is large: minutes on a slow line) ..."
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
