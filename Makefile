# Every target sets up what it needs in .venv; a second run finds it there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml

.PHONY: demo test bench lint format clean

demo: $(VENV)/installed
	$(BIN)/sparsegan demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),--cov=sparsegan --cov-report=term --cov-fail-under=85)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

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

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp,$(SOURCES))
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp,$(SOURCES))

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
