# Two commands do everything on a machine that has python3 (3.11 or newer, with venv) and a C++ compiler:
#   make demo    ask a document 64 times longer than the model was trained on, with four methods
#   make test    format check, lint, types, tests
# The first run of either makes .venv; later runs start at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kvote/kernels/cpu/src/*)

# Building kvote's own wheel is pinned as well.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test check format sanitize clean

demo: $(VENV)/.run
	$(BIN)/kvote ask --compare

# Tests run on all cores, each on one thread unless it asks for more.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Not part of `make test`, and needs CMake: a program that calls every kernel, watched by the compiler's sanitizers.
sanitize:
	@for watch in address,undefined,float-cast-overflow thread; do \
	  build=build/sanitize-$$watch; echo "Building $$build; this takes some minutes."; \
	  cmake -S . -B $$build -DKVOTE_SANITIZE=$$watch >/dev/null && cmake --build $$build && $$build/sanitize || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make needs Python 3.11 or newer (set PYTHON=...): the pinned transformers does." >&2; exit 1; }
	@echo "Setting up $(VENV); the first time, this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.run: $(VENV)/.torch $(SOURCES)
	$(PIP) --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --quiet -e '.[bench,dev,serve]'
	@touch $@ $(VENV)/.run
