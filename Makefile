# Everything runs in .venv, which the first target that needs it makes. On a fresh machine with Python >= 3.11,
# `make demo` and `make test` are the only commands needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIER ?= quick
ONLY ?=
INSTALLED := $(VENV)/.installed
# where tests start a Triton, and where they put load on one
TRITON_TESTS := tests/benchmarks/test_gpu_script.py tests/conformance tests/contract tests/e2e tests/export/test_verify.py
LOADED_TESTS := tests/e2e
# Tests start hundreds of Pythons: what the first has compiled the others take, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check docs bench bars containers constraints clean help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,local,planner,examples,docs,dev]'
	touch $@

demo: $(INSTALLED) ## start a real Triton and the orchestrator, replay a burst, print the ledger
	$(BIN)/cascadeserve demo

# Tests of one file share a Triton, so one worker runs the whole file; those that put load on it have the machine to themselves.
test: check ## static checks and the whole test suite
	$(BIN)/python -m pytest -m 'not triton' --numprocesses 2
	$(BIN)/python -m pytest -m 'triton and not loaded' --numprocesses 2 --dist loadfile $(TRITON_TESTS)
	$(BIN)/python -m pytest -m loaded $(LOADED_TESTS)

check: $(INSTALLED) ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## build the documentation as .cascadeserve/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(INSTALLED) ## measure what the orchestrator adds to a request, in time and in CPU time (needs wrk)
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.gateway_cost

bars: $(INSTALLED) ## decide the bars of benchmarks/bars.toml: make bars TIER=quick|full|soak|gpu [ONLY=prefix]
	$(BIN)/python -m benchmarks.bars --tier $(TIER) --only '$(ONLY)'

containers: $(INSTALLED) ## build and run docker-compose.cpu.yml, send it requests, take it down (needs a Docker engine)
	deploy/try_containers.sh

constraints: $(INSTALLED) ## write the installed versions to constraints.txt
	{ echo '# Versions that the test suite passed with; regenerate with `make constraints`.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

clean: ## remove everything that is not in git
	rm -rf $(VENV) .cascadeserve demo benchmarks/results/local build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
