# `make demo` plans a real deployment; `make test` checks everything. Both need Python 3.11 or newer and nothing else.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
TEST_VENV ?= .venv-test
WORKERS ?= 2
TRIALS ?= 36
export OMP_NUM_THREADS = 1
export NUMBA_NUM_THREADS = 1
export POLARS_MAX_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests start hundreds of processes: a module is compiled once, not by each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types imports tests bench accuracy accuracy-check accuracy-page clean clean-kernels

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(VENV)/bin/moesim tune notebooks/scenarios/demo.yaml --trials $(TRIALS) --workers $(WORKERS) --out runs/demo

$(VENV)/.installed: pyproject.toml constraints.txt $(shell find moesim profiles placement validate -name '*.py' -o -name '*.parquet' -o -name '*.json' -o -name '*.yaml' 2>/dev/null)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is not on the path; install it"; exit 3; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade --constraint constraints.txt .
	@touch $@

test: lint types imports tests

$(TEST_VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is not on the path; install it"; exit 3; }
	test -x $(TEST_VENV)/bin/python || $(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hardware,silicon,ray,postgres]'
	@touch $@

lint: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .

types: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/mypy

imports: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/lint-imports

tests: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/pytest --numprocesses 2 --dist worksteal --cov --cov-report term:skip-covered --benchmark-disable

bench: $(TEST_VENV)/.installed
	MOESIM_WHOLE=1 $(TEST_VENV)/bin/pytest tests/bench -s

# Prices all measured serving runs and writes the record and the table of it: half an hour of CPU, after a change of the
# model. The check prices some of them again: two and a half minutes of CPU, a minute and a half of it importing tables.
accuracy: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/moesim validate silicon --update --workers $(WORKERS)

accuracy-check: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/moesim validate silicon --check --workers $(WORKERS)

# One page of the record beside the measurements, runs/accuracy.html; prices nothing.
accuracy-page: $(TEST_VENV)/.installed
	mkdir -p runs
	$(TEST_VENV)/bin/moesim validate silicon --recorded --report runs/accuracy.html

clean: clean-kernels
	rm -rf $(VENV) $(TEST_VENV) runs build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Numba's cache: a kernel is not told stale when a function that it calls has changed.
clean-kernels:
	find moesim profiles placement validate tests -name '*.nb[ic]' -delete
