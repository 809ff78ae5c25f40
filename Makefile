# `make demo` and `make test` need Python 3.11 or newer and nothing else: both install into .venv. One of another
# Python than PYTHON stays as it is: make clean, then make test PYTHON=python3.13.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
SEED ?= 0
CASES ?= 300
FIRST ?= 1000
RUNS ?=
FULL ?=
# Installed before the rest, which would take the newest, with gigabytes for GPUs; where this one brings those too:
# make test TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# Tests that are run between edits: the mathematics, the rooms, and one tiny run.
QUICK := tests/core tests/settings tests/test_api.py tests/test_rooms.py tests/test_prose.py \
	tests/commands/test_library.py::test_the_twelve_lines
PACKAGES := "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test slow quick page fuzz notebooks installs dist lint types docs clean

demo: .venv/core
	bash launch/local.sh demo $(RUN) $(SEED)

test: .venv/dev lint types
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Whole programs: in several processes, killed and resumed, from a teacher to its pages.
slow: .venv/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

# Between edits. The compiled programs are kept: the first time takes longer.
quick: .venv/dev lint types
	JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/xla $(BIN)/python -m pytest -n 2 --durations=3 \
		$(QUICK)

# The page of `pflow demo` in a real browser. gradio takes an older Pillow than the other tests: it is installed in an
# environment of its own, which sees the packages of .venv. RUNS are workdirs to show, by default tiny ones.
page: build/page/installed
	PFLOW_PAGE_RUNS='$(RUNS)' JAX_PLATFORMS=cpu build/page/bin/python -m pytest tests/outside/test_page.py

build/page/installed: .venv/dev
	command -v chromium || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium; } \
		|| { echo 'make page: install Chromium, such that the command chromium starts it' >&2; exit 1; }
	$(BIN)/python -m venv build/page
	$(BIN)/python -c $(PACKAGES) > "$$(build/page/bin/python -c $(PACKAGES))/below.pth"
	build/page/bin/pip install --quiet --disable-pip-version-check --editable '.[demo]' 'playwright>=1.49'
	touch $@

# CASES damaged copies of every kind of file and run that is read, from case FIRST on, and a run that is killed twenty
# times.
fuzz: .venv/dev
	PFLOW_FUZZ_CASES=$(CASES) PFLOW_FUZZ_FIRST=$(FIRST) PFLOW_KILLS=20 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m '' \
		tests/fuzz tests/test_processes.py::test_no_run_is_lost_to_kills

# Every cell of notebooks/, shrunk; with FULL=1 as they are, and `make docs` then shows what they put out.
notebooks: .venv/dev
	PFLOW_FULL=$(FULL) $(BIN)/python -m pytest tests/outside/test_notebooks.py

# The release as it is downloaded, and the notebooks' first cell on Colab's releases, in environments of their own: needs
# an index of packages.
installs: .venv/dev
	$(BIN)/python -m pytest tests/outside/test_wheel.py tests/outside/test_installs.py

# Wheel and sdist, as they are uploaded, into dist/.
dist:
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install --quiet --disable-pip-version-check build 'twine>=6.1'
	rm -rf dist
	build/venv/bin/python -m build
	build/venv/bin/python -m twine check --strict dist/*

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# The site, into build/docs. MkDocs asks for attention to its next version, which these pages are not written for.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/core: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/docs: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
