# Every target sets up what it needs in .venv; a second run finds it there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml

.PHONY: demo test bench systems lint format clean

demo: $(VENV)/installed
	$(BIN)/sparsegan demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),--cov=sparsegan --cov-report=term --cov-fail-under=85)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

systems: $(VENV)/installed
	$(BIN)/python -m benchmarks.systems --write $(ARGS)

# In an environment of its own: the peers want particular versions of each other.
PEERS := .venv-peers
.PHONY: bench-peers
bench-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m benchmarks.peers $(ARGS)

$(PEERS)/packages: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet "setuptools>=77" wheel --requirement $<
	touch $@

$(PEERS)/installed: $(PEERS)/packages $(SOURCES)
	$(PEERS)/bin/pip install --quiet --no-build-isolation --editable .
	touch $@

# Need a CUDA device. gpu-test runs the tests of the CUDA kernels as they are and under each tool of compute-sanitizer, which comes
# with CUDA or as `pip install nvidia-cuda-sanitizer-api`. ARGS as in `make test`.
GPU_TESTS := tests/test_block_linear.py tests/test_block_conv2d.py tests/test_block_conv_transpose2d.py tests/test_cuda_ops.py \
	tests/test_cuda_device.py -k "cuda and not emulated"
.PHONY: gpu-test gpu-bench
gpu-test: $(VENV)/installed
	$(BIN)/python -c "from sparsegan.ops import cuda; import sys; sys.exit(cuda.unavailable())"
	$(BIN)/python -m pytest $(GPU_TESTS) $(ARGS)
	for tool in memcheck racecheck synccheck initcheck; do \
		echo "compute-sanitizer $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --kernel-name regex=sparsegan \
			$(BIN)/python -m pytest -x $(GPU_TESTS) $(ARGS) || exit 1; \
	done

gpu-bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cuh %.cu,$(SOURCES))
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cuh %.cu,$(SOURCES))

# torch first and by itself: the CPU build is a tenth of the size of what a plain `pip install torch` brings. A machine that already
# has a torch keeps it: set PYTHON to its interpreter and the environment sees its packages.
$(VENV)/torch:
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet "setuptools>=77" wheel
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info sparsegan/_C*.so
