# make demo   train a sparse network on the MNIST digits and compare it with a dense baseline
# make test   run the tests
# Both commands create the virtual environment .venv with all dependencies.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench wheel clean

demo: .venv/demo
	$(BIN)/sparing train recipes/mnist5k/demo.yaml --out runs/demo --resume auto

# One process per core, with one thread each.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict

bench: .venv/dev
	$(BIN)/python bench/step_overhead.py

# The wheels of sparing and of sparing-engine, the prebuilt libraries of sparing.engine.
wheel: .venv/dev
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --outdir dist wheels/engine

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,digits,export]'
	@touch $@

.venv/dev: .venv/demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
