# `make demo` and `make test` need only Python (3.10 to 3.13) and make: the rest is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
NB ?=
FLAGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PY := $(BIN)/python
CONSTRAINTS := .ci/constraints.txt
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-nbs sync-check export clean-nbs readme figures docs docs-check preview clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## make the virtual environment and install the package into it, once

# PyTorch goes in first, by its exact pin, so that the dependencies of the rest cannot choose another build of it.
# Bytecode is made beside pip, which takes one core, and after it on all; files that are no Python of this version stay without.
COMPILE = $(PY) -m compileall -q -x '/(tests|pip|debugpy)/' $(VENV)/lib > /dev/null
$(STAMP): settings.ini setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v[:2] <= (3, 13) else f"Python 3.10 to 3.13 is needed, not {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile -c $(CONSTRAINTS) $(TORCH)
	$(COMPILE) & $(PY) -m pip install -q --no-compile -c $(CONSTRAINTS) -e '.[dev]' || exit 1; wait; $(COMPILE) -j 0 || true
	@touch $@

demo: env ## solve two real problems and leave their pictures in output/
	@mkdir -p output
	$(PY) -m flash_sinkhorn_hessian.demo

test: env ## notebooks against modules, the notebooks' own tests, then pytest
	$(PY) .ci/sync.py --check
	$(PY) .ci/nbtest.py --workers $(WORKERS) --flags "$(FLAGS)"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest tests -n $(WORKERS) --dist worksteal

test-nbs: env ## the notebooks' tests alone; NB=hvp picks some, FLAGS="slow cuda" adds skipped cells
	$(PY) .ci/nbtest.py --workers $(WORKERS) --flags "$(FLAGS)" $(NB)

sync-check: env ## fail if exporting or cleaning the notebooks would change anything
	$(PY) .ci/sync.py --check

export: env ## write the modules, their index, nbdev.yml and sidebar.yml from the notebooks
	$(PY) .ci/sync.py

clean-nbs: env ## strip notebooks of what only makes noise in a diff
	$(PY) .ci/sync.py --clean

readme: env ## write README.md from nbs/index.ipynb
	$(PY) .ci/readme.py

figures: env ## draw saved figures again, after a change of style; NB=hvp picks the notebooks
	$(PY) .ci/figures.py $(or $(NB),nbs/)
	$(PY) .ci/sync.py --clean

docs: env ## build the site into _docs, with Quarto
	$(PY) .ci/site.py

docs-check: env ## check the pages' links, anchors, images and formulas; Quarto is not needed
	$(PY) .ci/docs_check.py

preview: env ## render into _preview without Quarto, with npm and Chromium, and look for what overflows
	@mkdir -p _preview/node
	npm install --silent --prefix _preview/node bootstrap@5.3 bootswatch@5.3 sass playwright-core
	$(PY) .ci/preview.py
	node .ci/look.js _preview

clean: ## remove what was built, but not the environment
	rm -rf _docs _proc _preview build dist output *.egg-info .pytest_cache .hypothesis
	find nbs flash_sinkhorn_hessian tests .ci -name __pycache__ -prune -exec rm -rf {} +
