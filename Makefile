# Everything a person types. Needs python3 (3.11 to 3.13) with venv, and make; the rest is installed into .venv.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-ray test-all lint types format clean

PY := .venv/bin/python
STAMP := .venv/.installed
CODE := $(foreach folder,cast_ray sweeps tests benchmarks examples,$(if $(shell find $(folder) -name '*.py' 2>/dev/null | head -1),$(folder)))
PYTHONS := python3 python3.13 python3.12 python3.11
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# One line per fetched package: pip's own output is either nothing for minutes or several lines a package.
PROGRESS := /^ *(Downloading|Using cached|Processing) .*[.]whl/ { \
  size = match($$0, /[(][0-9.]+ [kMG]?B[)]/) ? substr($$0, RSTART, RLENGTH) : ""; \
  sub(/^ *[A-Z][a-z]+ (cached )?/, ""); sub(/ .*/, ""); sub(".*/", ""); sub(/-(cp|py)[0-9].*/, ""); \
  printf "  %3d  %s %s\n", ++n, $$0, size; fflush() } \
  /^Installing collected/ { print "  unpacking (a minute or two)"; fflush() }
# Processes that run tests side by side, each of which may have a Ray at work.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 4 ? 4 : n )))
PARALLEL = $(if $(filter-out 1,$(JOBS)),-n $(JOBS))
# Two threads a process on two busy cores is slower than one, and Ray starts several processes.
export OMP_NUM_THREADS ?= 1

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## set up, then measure what each loss term is worth on drawn scenes (ARGS="..." is passed on)
	@$(PY) sweeps/ablate.py losses --preset shapes $(ARGS)

test: $(STAMP) ## set up, then run the tests (ARGS="-k name" is passed on; JOBS=1: in one process)
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

test-ray: $(STAMP) ## the tests in folders of tests that start a Ray, without the slow ones
	@$(PY) -m pytest tests/ray tests/faults tests/packaging $(ARGS)

test-all: $(STAMP) ## the tests and the slow ones (minutes long)
	@$(PY) -m pytest -m '' $(PARALLEL) $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(PY) -m ruff check $(CODE)
	@$(PY) -m ruff format --check $(CODE)

types: $(STAMP) ## mypy
	@$(PY) -m mypy $(CODE)

format: $(STAMP) ## rewrite the code as `lint` wants it
	@$(PY) -m ruff check --fix $(CODE)
	@$(PY) -m ruff format $(CODE)

clean: ## remove caches (keeps .venv, and storage/ and runs/ with your results)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# One stamp for all targets: written last, so that an interrupted install is done again.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) -c '$(FITS)' >/dev/null 2>&1; then \
	  python=; for name in $(PYTHONS); do if "$$name" -c '$(FITS)' >/dev/null 2>&1; then python=$$name; break; fi; done; \
	  if [ -z "$$python" ]; then \
	    echo "error: no usable Python: expected python3 3.11 to 3.13 with the venv and ensurepip modules (tried: $(PYTHONS));" >&2; \
	    echo "       python3 here is: $$(python3 --version 2>&1 || true). On Debian or Ubuntu: apt install python3 python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing pinned dependencies into .venv (several GB with PyTorch's CUDA libraries; log: .venv/install.log)"
	@$(PY) -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]' 2>.venv/install.err \
	  | tee .venv/install.log | awk '$(PROGRESS)' || { tail -20 .venv/install.err >&2; exit 1; }
	@touch $@
	@echo "Installed."
