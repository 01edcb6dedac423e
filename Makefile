# `make help` lists the commands.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

python := $(VENV)/bin/python
# Runs a command with this environment's PyTorch as the one that Cargo builds against.
with_torch := $(python) scripts/torch_env.py
# What runs a second time, on PyTorch's own operations; all of tests/step passes too.
composed_tests := tests/ops tests/step/test_cat_step.py tests/step/test_low_precision.py
rust_sources := $(shell find src -type f) Cargo.toml Cargo.lock build.rs .cargo/config.toml

.PHONY: help build test test-rust test-python test-gpu fuzz mutants lint format docs demo notebook bench wheel test-wheel
.PHONY: release-check clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make build        set up $(VENV): PyTorch, cat-rs built in place, everything to train and to develop"
	@echo "make demo         personalize the bundled model without and with CAT, compare; writes demo/"
	@echo "make notebook     execute examples/quickstart.ipynb and save it with its outputs"
	@echo "make test         build, then the Rust and the Python tests"
	@echo "make test-gpu     build, then the tests that need an NVIDIA GPU; writes benchmarks/results/gpu_tests.md"
	@echo "make fuzz         random calls of everything, in child processes: ARGS=\"--seconds 600\""
	@echo "make mutants      plant random faults in the Python code, and list those that no test notices; takes hours"
	@echo "make lint         formatting, clippy, ruff, mypy, and the stub file against the module"
	@echo "make format       format Rust and Python sources"
	@echo "make docs         run every example of the pages, then build the site in build/site; a dead link is an error"
	@echo "make bench        the benchmarks of README, on an idle machine"
	@echo "make wheel        a wheel in dist/ for one Python and every PyTorch, or some: PYTHON=python3.12 TORCH=\"2.13 2.14\""
	@echo "make test-wheel   the same, then the Python tests with that wheel installed"
	@echo "make release-check  version, tag and changelog agree; wheel and source archive work beside every PyTorch"
	@echo "make clean        remove what was built; make distclean: the environments too"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment, ARGS=... are passed to demo, notebook, bench,"
	@echo "fuzz, mutants, test-rust and test-python. \`make test-python ARGS='-k cat_loss'\` runs some of the tests."

build: $(VENV)/.built

$(VENV)/.environment: pyproject.toml
	@sh scripts/check_tools.sh $(PYTHON)
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install "torch==2.13.*" "maturin>=1.9,<2" setuptools
	@touch $@

$(VENV)/.built: $(VENV)/.environment $(rust_sources)
	@sh scripts/check_tools.sh $(python)
	$(with_torch) maturin develop --release --extras train,dev,docs
	@touch $@

test: build
	$(with_torch) cargo test --no-default-features
	$(python) -m pytest
	CAT_RS_BACKEND=torch $(python) -m pytest $(composed_tests)

test-rust: build
	$(with_torch) cargo test --no-default-features $(ARGS)

test-python: build
	$(python) -m pytest $(ARGS)

test-gpu: build
	$(python) scripts/test_gpu.py $(ARGS)

fuzz: build
	$(python) -m tests.fuzz $(ARGS)

mutants: build
	$(python) scripts/mutants.py $(ARGS)

# The first clippy run sees the tests, the second the Python module: with it, test programs do not link.
lint: build
	cargo fmt --check
	$(with_torch) cargo clippy --no-default-features --all-targets -- -D warnings
	$(with_torch) cargo clippy --release -- -D warnings
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m mypy.stubtest cat_rs._core

format:
	cargo fmt
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

docs: build
	$(python) -m pytest -q tests/test_docs.py tests/test_examples.py tests/step/test_families.py
	$(python) scripts/docs_site.py

demo: build
	$(VENV)/bin/cat-rs demo $(ARGS)

notebook: build
	$(python) scripts/notebook.py $(ARGS)

bench: build
	$(python) -m benchmarks $(ARGS)

wheel:
	@sh scripts/check_tools.sh $(PYTHON)
	$(PYTHON) scripts/wheel.py $(TORCH)

test-wheel:
	@sh scripts/check_tools.sh $(PYTHON)
	$(PYTHON) scripts/wheel.py $(TORCH) --test

release-check:
	@sh scripts/check_tools.sh $(PYTHON)
	test -x build/tools/bin/python || $(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet "build>=1.2" "maturin>=1.9,<2" packaging
	build/tools/bin/python scripts/release_check.py $(ARGS)

clean:
	rm -rf target dist demo build/*/torch* python/cat_rs/_core.*.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find python tests scripts benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf build $(VENV)
