# Every target makes the virtual environment that it needs; nothing has to be installed by hand but Python 3.10 or
# newer, GNU make and (for kdfast.replay) a C++17 compiler.
#
#   PYTHON    the interpreter that .venv is made with                      make test PYTHON=python3.12
#   TORCH     what pip installs as torch: another release, or a wheel      make test TORCH=torch==2.11.0
#   VENV      where the virtual environment lives                          make test VENV=/tmp/venv
#   SANITIZE_PYTHON  what .venv-sanitize is made with; 3.12 or newer       make sanitize SANITIZE_PYTHON=python3.13
#   JOBS      test processes                                               make test JOBS=8
#   DEMO_OUT  where the demo goes; run again, it goes on where it stopped  make demo DEMO_OUT=out/other
#   DEMO_ARGS further options of the demo                                  make demo DEMO_ARGS="--seed 1" DEMO_OUT=out/1
#
# On a machine with a GPU pip's own torch is a CUDA build, and `demo` and `test-gpu` use it.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DEMO_OUT ?= out/demo
BENCH_OUT ?= out/bench
DEMO_ARGS ?=
BENCH_ARGS ?=
SANITIZE_PYTHON ?= python3.12
SANITIZE_ARGS ?=
TORCH ?= $(shell sed -n '/^torch==/p' tests/constraints.txt)

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip --quiet
BASE_STAMP := $(VENV)/.torch-installed
STAMP := $(VENV)/.kdfast-installed

# One thread a process: small tensors on several threads only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup
CPP := $(wildcard csrc/*.cpp csrc/*.hpp)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all test-gpu test-vision sanitize lint format imports docs bench hostbench clean distclean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1   \2/p' $(MAKEFILE_LIST)

$(BASE_STAMP): tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdfast needs Python 3.10 or newer; say which: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install $(TORCH)
	@touch $@

# torch is installed first and alone, so that nothing else chooses its build. From then on it is held where it is; the
# pinned Triton gives way to the one that a CUDA build of torch brought along.
$(VENV)/constraints.txt: $(BASE_STAMP)
	@sed '/^torch==/d' tests/constraints.txt > $@
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $@
	@! $(PY) -c 'import triton' 2>/dev/null || sed -i '/^triton==/d' $@

$(STAMP): $(VENV)/constraints.txt pyproject.toml setup.py $(CPP)
	$(PIP) install -c $(VENV)/constraints.txt setuptools pybind11 ninja
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[all,dev]'
	@touch $@

install: $(STAMP) ## Make .venv with kdfast (editable) and everything the other targets need

demo: $(STAMP) ## Run the whole path on real images, and write a report to out/demo
	$(BIN)/kdfast demo --resume --out $(DEMO_OUT) $(DEMO_ARGS)

# Triton reads TRITON_INTERPRET when it is imported, so the kernels' suite is a process of its own.
test: $(STAMP) ## Run the tests
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests
	$(PYTEST) -m "not slow and not gpu and not interpreter" tests

# TRL and Lightning, whose trainers the adapters' slow tests run; without them those tests skip.
$(VENV)/.trainers-installed: $(STAMP)
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[all,dev,trainers]'
	@touch $@

test-all: $(VENV)/.trainers-installed ## Run the tests with the slow ones, and the GPU's where there is one
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests
	@! $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(MAKE) test-gpu
	$(PYTEST) -m "not gpu and not interpreter" tests
	$(MAKE) test-vision

# torchvision and timm do not import beside the torch that the tests pin, so they have an environment of their own.
.venv-vision/.installed: tests/vision/requirements.txt pyproject.toml setup.py $(CPP)
	$(PYTHON) -m venv .venv-vision
	.venv-vision/bin/python -m pip install -q -r tests/vision/requirements.txt setuptools pybind11 ninja
	.venv-vision/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

test-vision: .venv-vision/.installed ## Run the tests with torchvision, timm and 🤗 networks
	OMP_NUM_THREADS=1 .venv-vision/bin/python -m pytest -o addopts= -q -p no:cacheprovider tests/vision

test-gpu: $(STAMP) ## Run the tests that need a GPU
	$(PY) -m pytest -m gpu tests

# Its own environment: ttsem checks the IR of the Triton that it was written for, on a newer Python than kdfast needs.
.venv-sanitize/.installed: tests/sanitizer/requirements.txt setup.py $(CPP)
	@$(SANITIZE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "ttsem needs Python 3.12 or newer; say which: make sanitize SANITIZE_PYTHON=python3.13")'
	$(SANITIZE_PYTHON) -m venv .venv-sanitize
	.venv-sanitize/bin/python -m pip install -q -r tests/sanitizer/requirements.txt
	.venv-sanitize/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# Planted faults first: a checker that finds nothing in them would find nothing anywhere. Then all on an H100; A100 and
# B200 differ in their launch plans, which a pass through every case shows: gradients, or results where there are none.
PLANS := -k "(test_gradients_match or test_matches and (replay or procedural)) and float32"
SANITIZED := OMP_NUM_THREADS=1 .venv-sanitize/bin/python -m pytest -o addopts= -p no:cacheprovider -q --tb=short \
  --show-capture=no -m "gpu and not slow" -n $(JOBS) --dist load -p tests.sanitizer.plugin $(SANITIZE_ARGS)
sanitize: .venv-sanitize/.installed ## Check the kernels for races, bounds and unwritten memory, without a GPU
	$(SANITIZED) --sanitize 90 tests/sanitizer/planted.py
	$(SANITIZED) --sanitize 90 tests/kernels
	$(SANITIZED) --sanitize 80 $(PLANS) tests/kernels
	$(SANITIZED) --sanitize 100 $(PLANS) tests/kernels

lint: $(STAMP) imports ## Check formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# Over the unpacked wheel, because an editable install hides kernels/ from import-linter.
imports: $(STAMP)
	@rm -rf build/imports
	$(PY) -m build --no-isolation --outdir build/imports . > /dev/null
	@$(PY) -m zipfile -e build/imports/*.whl build/imports/wheel
	cd build/imports/wheel && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml

format: $(STAMP) ## Rewrite the code the way `lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(STAMP) ## Build the documentation into docs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

bench: $(STAMP) ## Run the benchmarks
	OMP_NUM_THREADS=1 $(PY) -m pytest bench --benchmark-only $(BENCH_ARGS)

hostbench: $(STAMP) ## Measure what each call costs on the host, without a GPU
	OMP_NUM_THREADS=1 $(PY) -m bench.hostbench

clean: ## Remove what builds leave behind
	rm -rf build dist out docs/site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kdfast kernels tests bench recipes -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove those and the virtual environments
	rm -rf $(VENV) .venv-sanitize .venv-vision kdfast/_C*.so
