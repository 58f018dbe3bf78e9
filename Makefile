# make env | finetune | test | test-search | test-gpu | test-all | interop | lint | advisories | system-deps
#
# Only git, make and Python >= 3.11 are taken for granted. Another interpreter: make env PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.qllava-installed
PIP     = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help env finetune test test-search test-gpu test-all interop lint advisories system-deps

help:
	@echo "make env          install qllava and its tools into $(VENV) (the first time about 6 GB, most of it torch)"
	@echo "make finetune     both training stages of the embedded nano model: minutes, no GPU, no account"
	@echo "make test         unit and browser tests: minutes"
	@echo "make test-search  property tests on examples that are drawn at random, other ones in every run"
	@echo "make test-gpu     the tests that need a GPU; all others compute on the CPU, whatever is there"
	@echo "make test-all     every test, the slow ones and those for a GPU included"
	@echo "make interop      build llama.cpp from source (a C++ compiler; 10 minutes), and ask it what transformers is asked"
	@echo "make lint         ruff and mypy"
	@echo "make advisories   ask osv.dev for known weaknesses of what is installed (needs the network)"
	@echo "make system-deps  chromium for the browser tests (Debian, Ubuntu; needs root)"

env: $(STAMP)

# The stamp is written last: an installation that was interrupted is taken up again by the next make.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 \
	  || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "qllava needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1): make env PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || echo "Making $(VENV): the first time this downloads about 6 GB (most of it torch) and takes minutes."
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu run apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install -q -e '.[dev]' \
	  || { echo "The installation failed; trying once more." >&2; sleep 5; $(PIP) install -e '.[dev]'; }
	@touch $@

# The recipe refuses a finished run; who types this again wants to know where the result is, and has made no mistake.
FINISHED = runs/finetune_lora
finetune: env
	@if [ -z "$(ARGS)" ] && [ -f $(FINISHED)/results.json ]; then \
	  echo "The run in $(FINISHED) is finished: open $(FINISHED)/report.html in a browser."; \
	  $(BIN)/python -c "from pathlib import Path; from qllava.runs import Run; Run(Path('$(FINISHED)')).is_of_another_nano \
	    and print('It was trained on another version of nano: chat, merge and demo of this version refuse it.')"; \
	  echo "To begin again: make finetune ARGS=--overwrite_output_dir"; \
	else $(BIN)/python recipes/finetune_lora.py $(ARGS); fi

# One test process for each core, of one thread: torch's threads would wait for each other in turn.
# Files in the order of their names: by number of tests, those of few long tests would come last, to one process.
SIDE_BY_SIDE = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs $(SIDE_BY_SIDE) -m "not slow and not gpu and not interop" $(ARGS)

# Random, so a failure here is a finding and not a fault of the last change: add it as an @example, and mend it.
test-search: env
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -rs $(SIDE_BY_SIDE) -m "not slow and not gpu and not interop" \
	  $$(grep -rl "^from hypothesis import" tests) $(ARGS)

# One process: the card's memory is one.
test-gpu: env
	QLLAVA_TEST_GPU=1 $(BIN)/python -m pytest -rs -m gpu $(ARGS)

test-all: env
	$(BIN)/python -m pytest -rs -m "not gpu" $(ARGS)
	$(MAKE) test-gpu

interop: env $(VENV)/.qllava-llama-cpp
	$(BIN)/python -m pytest -rs -s -m interop $(ARGS)

# One line is mended on the way, as https://github.com/ggml-org/llama.cpp/pull/25844 does it: llama.cpp appends the class
# token to the patches and then takes what it appended for a patch. Where that is mended already, sed changes nothing.
LLAMA_CPP = build/llama-cpp-python
LLAVA_CPP = $(LLAMA_CPP)/vendor/llama.cpp/tools/mtmd/models/llava.cpp
$(VENV)/.qllava-llama-cpp: $(STAMP)
	@rm -rf $(LLAMA_CPP) && mkdir -p $(LLAMA_CPP)
	@$(PIP) download -q --no-deps --no-binary llama-cpp-python -d $(LLAMA_CPP) 'llama-cpp-python>=0.3.36,<0.4'
	@tar -xzf $(LLAMA_CPP)/*.tar.gz --strip-components 1 -C $(LLAMA_CPP)
	@sed -i.orig 's/ggml_concat(ctx0, inp, model.class_embedding, 1)/ggml_concat(ctx0, model.class_embedding, inp, 1)/' $(LLAVA_CPP)
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF $$CMAKE_ARGS" $(PIP) install -q ./$(LLAMA_CPP)
	@touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip-audit has an environment of its own, so that what it needs is not taken for what qllava needs. It ends with 1 for
# a weakness and for a service that it could not ask; only a weakness is written to its report.
AUDIT  = $(VENV)/audit
REPORT = build/advisories.txt

advisories: env $(VENV)/.qllava-audit
	@mkdir -p build && rm -f $(REPORT)
	@installed=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || exit 2; \
	$(AUDIT)/bin/pip-audit --vulnerability-service osv --path "$$installed" --skip-editable --progress-spinner off \
	  --output $(REPORT) $(ARGS) 2> $(REPORT:.txt=.log); status=$$?; \
	if [ $$status -eq 0 ]; then \
	  echo "osv.dev knows of no weakness in what is installed in $(VENV)."; \
	elif [ -s $(REPORT) ]; then \
	  cat $(REPORT); echo "osv.dev knows of the weaknesses above; install a version that mends them." >&2; exit 1; \
	else \
	  echo "osv.dev could not be asked, so nothing is known about what is installed; $(REPORT:.txt=.log) says why." >&2; exit 2; \
	fi

$(VENV)/.qllava-audit: $(STAMP)
	@$(BIN)/python -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip --disable-pip-version-check install -q 'pip-audit>=2.10,<3'
	@touch $@

system-deps:
	@if command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1; then \
	  echo "A chromium browser is there already."; \
	elif ! command -v apt-get >/dev/null 2>&1; then \
	  echo "system-deps knows Debian and Ubuntu only: install chromium with your system's package manager (only the browser tests need it)." >&2; exit 1; \
	elif [ "$$(id -u)" -ne 0 ]; then \
	  echo "system-deps needs root: sudo make system-deps (only the browser tests need it)." >&2; exit 1; \
	else \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; \
	fi
