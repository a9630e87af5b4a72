# Every target sets up what it needs: a virtual environment in VENV with this project installed from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
# Touched after an install; older than pyproject.toml or constraints.txt, it is installed again.
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo benchmark check test lint typecheck clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(DEMO_READY)  ## both stages on the embedded scenes, and their scores
	$(BIN)/clip-zss demo

benchmark: $(DEMO_READY)  ## the demo with three seeds; writes the tables in benchmarks/
	$(BIN)/clip-zss demo --seeds 0,1,2 --output benchmarks

check: lint typecheck  ## style, types, and the fast tests of losses, cache and settings
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' tests/pipeline/learning tests/cache tests/configs

test: lint typecheck  ## all checks, as CI runs them
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(TEST_READY)  ## style, and who imports whom
	$(BIN)/ruff check --extend-exclude $(VENV)
	$(BIN)/lint-imports

typecheck: $(TEST_READY)  ## types, and that nothing is called that Windows lacks
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

clean:  ## removes the virtual environment
	rm -rf $(VENV)

$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(TEST_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,test]'
	touch $(DEMO_READY) $@
