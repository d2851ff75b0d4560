# Everything a fresh clone needs; `make` alone explains itself.
#   make VENV="$VIRTUAL_ENV" test    use an environment of your own
#   make TORCH=torch==2.9.1 install  choose another torch (one that is importable already is always kept)
VENV  ?= .venv
TORCH ?= torch==2.13.0
DEMO  ?= outputs/demo
FUZZ_SECONDS ?= 600

# $(VENV)/bin first: what the recipes below start (qexp, compilers' helpers) comes from this environment.
export PATH := $(abspath $(VENV))/bin:$(PATH)
PY    := $(VENV)/bin/python
# The stamp names the checkout: two clones may share one environment, the last installed one is the one importable.
STAMP := $(VENV)/.installed$(subst /,-,$(CURDIR))
FAST  := not slow and not gpu and not bench
CI    := not gpu and not bench
# One worker per core, one thread each; TESTS=-n0 runs them in one process, in order.
TESTS ?= -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install kernels demo test test-fast test-slow test-gpu paper-smoke fuzz check fmt bench clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## .venv with torch, qexp (editable) and the developer tools; nothing to do when done

$(PY):
	@for p in python3.12 python3.11 python3.13 python3 python; do \
	    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "creating $(VENV) with $$("$$p" --version)"; \
	    "$$p" -m venv "$(VENV)" && exit 0; \
	    rm -rf "$(VENV)"; \
	done; echo "no python >= 3.11 with the venv module found; install one (Debian: apt install python3-venv)" >&2; exit 1

# torch goes in first and alone: whatever build of it is there (CPU, CUDA, nightly) is then left as it is.
$(STAMP): pyproject.toml | $(PY)
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --progress-bar off "$(TORCH)"
	$(PY) -m pip install --progress-bar off -q -e '.[dev]'
	@rm -f "$(VENV)"/.installed-* && touch "$@"

kernels: install ## compile csrc/cpu now, once (else the first run that needs it does)
	@$(PY) -c 'from qexp.kernels.ops import kernel_info as k; i = k(); print("kernels:", i["isa"], i["reason"])'

demo: install ## a real sweep on the embedded model, its table and its HTML report (under 5 minutes on 2 cores)
	qexp -m method=fp16,rtn,gptq,quarot bits=w4a16,w4a4kv4 output_dir=$(DEMO)
	qexp-report $(DEMO) --html $(DEMO)/report.html
	@echo "report: $(abspath $(DEMO))/report.html"

test: kernels ## the suite: fast tests first, then the slow ones; no GPU, no network
	$(PY) -m pytest -q $(TESTS) -m "$(CI)"

test-fast: kernels ## the fast tests alone
	$(PY) -m pytest -q $(TESTS) -m "$(FAST)"

test-slow: kernels ## the slow tests alone
	$(PY) -m pytest -q $(TESTS) -m "slow and $(CI)"

test-gpu: install ## what needs a CUDA device
	$(PY) -m pytest -q -m gpu

paper-smoke: kernels ## every sweep of the papers' tables and ablations, tiny, on the embedded model
	$(PY) -m qexp.paper_smoke

fuzz: install ## coverage-guided fuzzing of csrc/cpu for FUZZ_SECONDS (600), needs clang; inputs stay in outputs/fuzz
	$(PY) tests/core_fuzz.py "$(FUZZ_SECONDS)"

check: install ## ruff, ruff format, mypy strict on qexp, fast tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q $(TESTS) -m "$(FAST)"

fmt: install ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install ## speed of the kernels against their floors and peers
	@mkdir -p outputs
	qexp-bench kernels --json outputs/bench.json

clean: ## remove build products and caches (outputs/ and .venv stay)
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qexp conf sweeps tests -name __pycache__ -type d -prune -exec rm -rf {} +
