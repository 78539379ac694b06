# Every target sets up what it needs, in .venv (VENV=... for another place), and is quick when that is there.
VENV ?= .venv
export VENV
BIN := $(VENV)/bin

.PHONY: demo test lint format bench setup clean

demo:  ## the main job on models made on the spot
	@scripts/setup.sh demo
	$(BIN)/seme demo --overwrite

test:  ## the whole suite
	@scripts/setup.sh test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

format:  ## ruff and clang-format, in place
	@scripts/setup.sh test,dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

lint:  ## every check of .pre-commit-config.yaml on every tracked file
	@scripts/setup.sh test,dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pre_commit run --all-files

bench:  ## the ops against plain torch; docs/benchmarks.md has the rest
	@scripts/setup.sh test,bench
	$(BIN)/python -m pytest benchmarks/test_ops.py

setup:  ## the environment of development
	@scripts/setup.sh test,bench,dev

clean:  ## what builds and tools leave behind, the environment excepted
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find seme kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
