# `make help` lists the targets. Each makes .venv by itself the first time.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Of its own: to the rest of the tests JAX must be what it is on a machine without a GPU.
GPU_VENV  := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
PYTEST  = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
WORKERS ?= 2

# The contract of both packages, where the rest would mostly test other versions' numbers.
CONTRACT = tests/jax/test_jax_contract.py tests/jax/test_jax_eval.py \
  tests/jax/test_jax_torch_checkpoint.py tests/integrations/test_flax.py \
  tests/torch/test_torch_contract.py tests/torch/test_record.py \
  parity_tests/test_replay.py

.PHONY: demo test test-slow oldest newest tpu gpu gpu-slow gpu-day types lint format parity \
  bench docs package clean help
.DEFAULT_GOAL := help

%/bin/python:
	$(PYTHON) -m venv $*

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(GPU_STAMP): pyproject.toml constraints.txt | $(GPU_VENV)/bin/python
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[gpu-compiler]' hypothesis pytest
	@touch $@

demo: $(STAMP)  ## train digits in Flax and PyTorch side by side; writes out/demo/
	$(BIN)/python examples/digits.py

test: $(STAMP)  ## tests and doctests, a few minutes on two cores
	$(PYTEST)

# pytest exits with 5 when nothing is marked slow.
test-slow: $(STAMP)  ## the long tests only
	$(PYTEST) -m 'slow and not gpu' || [ $$? -eq 5 ]

tpu: $(STAMP)  ## compile every step for TPUs, on this machine (installs libtpu)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]'
	$(BIN)/python -m pytest -m tpu tests/jax/test_tpu_compile.py

gpu: $(GPU_STAMP)  ## compile every step for NVIDIA's GPUs, on this machine
	$(GPU_VENV)/bin/python -m pytest -m 'gpu and not slow' tests/jax/test_gpu_compile.py

gpu-slow: $(GPU_STAMP)  ## the rest of these: GPT-2's leaves on each GPU, in each form
	$(GPU_VENV)/bin/python -m pytest -m 'gpu and slow' tests/jax/test_gpu_compile.py

# Old versions warn of each other, so warnings are no errors there.
oldest: .venv-oldest/bin/python  ## the contract tests on the lowest versions that pyproject.toml names
	.venv-oldest/bin/python .ci/lowest.py >.venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet \
	  --constraint .venv-oldest/constraints.txt --editable '.[flax,parity]' \
	  hypothesis scikit-learn 'pytest<9.2'
	.venv-oldest/bin/python -m pytest -W default -p no:cacheprovider $(CONTRACT)

newest: .venv-newest/bin/python  ## the contract tests on the newest versions that there are (torch: as pinned)
	grep '^torch==' constraints.txt >.venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  --constraint .venv-newest/constraints.txt --editable '.[flax,parity]' \
	  hypothesis scikit-learn 'pytest<9.2'
	.venv-newest/bin/python -m pytest -p no:cacheprovider $(CONTRACT)

docs: .venv-docs/bin/python  ## the documentation site, checked, in out/site/
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	.venv-docs/bin/python docs/check_site.py out/site

package: .venv-package/bin/python  ## the wheel and the source archive in dist/, checked, and the wheel alone
	.venv-package/bin/python -m pip install --quiet build twine
	rm -rf dist
	.venv-package/bin/python -m build --outdir dist .
	.venv-package/bin/python -m twine check --strict dist/*
	$(PYTHON) .ci/wheel_alone.py dist/*.whl

types: $(STAMP) .venv-types/bin/python  ## pyright on a user's program; mypy is in test-slow
	.venv-types/bin/python -m pip install --quiet --constraint constraints.txt 'pyright[nodejs]'
	.venv-types/bin/pyright --pythonpath $(BIN)/python tests/user_program.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP)  ## the parity matrix, with its report in out/parity/
	TRITON_INTERPRET=1 $(BIN)/python -m parity_tests matrix --report out/parity

bench: $(STAMP)  ## step time against the floor and peers, 5 minutes on two cores
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

# Of the machine's own Python: the installed PyTorch and JAX know its GPU, .venv's do not.
gpu-day:  ## all that a GPU is needed for, on a machine that has one
	$(PYTHON) -m benchmarks gpu-day $(GPU_DAY)

clean:  ## remove .venv, out/ and caches
	rm -rf $(VENV) .venv-* out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
