# make demo   train a sparse network on the MNIST digits and compare it with a dense baseline
# make test   run the tests
# Both commands create the virtual environment .venv with all dependencies.

PYTHON ?= python3
BIN := .venv/bin
# pip installs faster if Python compiles modules when they are first imported.
export PIP_COMPILE := 0

.PHONY: demo test test-slow lint sanitize docs bench wheel check-wheel check-demo check-gpu check-sets clean

demo: .venv/demo
	$(BIN)/sparing train recipes/mnist5k/demo.yaml --out runs/demo --resume auto

# One process per core, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

test: .venv/dev
	$(PYTEST) --dist worksteal -m "not slow"

# Processes, runtimes and whole runs; the notebook, pages of frameworks, shell lines of all pages; issue reports.
test-slow: .venv/dev
	$(PYTEST) --dist loadgroup -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Random plans of the engine under the sanitizers, with portable code and with that for this processor.
SANITIZED := build/sanitize/address-generic build/sanitize/address-native build/sanitize/thread-native
FLAGS_address := -fsanitize=address,undefined
FLAGS_thread := -fsanitize=thread
FLAGS_native := -march=native

sanitize: $(SANITIZED)
	for program in $^; do echo $$program; ASAN_OPTIONS=allocator_may_return_null=1 $$program 0 500 || exit 1; done

build/sanitize/%: tests/engine/fuzz.cpp $(wildcard src/sparing/engine/kernels/*)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -fno-access-control -ffp-contract=fast -fno-math-errno -pthread -fno-sanitize-recover=all \
		$(foreach part,$(subst -, ,$*),$(FLAGS_$(part))) $< -o $@

docs: .venv/dev
	$(BIN)/mkdocs build --strict

bench: .venv/dev
	$(BIN)/python bench/step_overhead.py

# The wheels of sparing and of sparing-engine, the prebuilt libraries of sparing.engine.
wheel: .venv/dev
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --outdir dist wheels/engine

# Other checks of .ci/run.
check-wheel:
	.ci/check_wheel

check-demo: .venv/dev
	$(MAKE) demo
	$(BIN)/python bench/check_demo.py runs/demo

# The measurements for a GPU, tried out on the CPU.
check-gpu: .venv/dev
	$(BIN)/python bench/gpu.py --smoke --processes 1

# The engine with other instruction sets than that of this processor.
check-sets: .venv/dev
	own=$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'); \
	for set in avx2 default; do \
		[ $$set = $$own ] || ATEN_CPU_CAPABILITY=$$set $(BIN)/pytest -q tests/test_engine_kernels.py || exit 1; \
	done

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
