# Everything runs in .venv, which `make demo` (users) and `make test` (developers) build from Python alone,
# with the versions in requirements.lock. `make test-newest` and `make test-lowest` have environments of their
# own, without the lock: at both ends of what settings.ini allows.
PYTHON ?= python3
VENV ?= .venv
VERSIONS ?= requirements.lock
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip -qq --disable-pip-version-check install
# The releases in the lock are not made for a Python older than 3.11.5: pip then chooses among what settings.ini allows.
LOCKED = $(shell "$(PYTHON)" -c 'import sys; old = sys.version_info < (3, 11, 5) and "$(VERSIONS)" == "requirements.lock"; \
  print("" if old else "--constraint $(VERSIONS)")')
.DEFAULT_GOAL := help
.PHONY: help demo test lint test-slow test-newest test-lowest lock notebooks lab bench results clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r t h; do printf 'make %-12s  %s\n' "$$t" "$$h"; done

demo: $(VENV)/user.stamp  ## Caption a few photos with the bundled model, offline
	@$(VENV)/bin/clipcap demo

test: lint  ## Check style and notebooks, run each notebook, then pytest (ARGS=... for pytest)
	$(PY) tools/run_notebooks.py
	$(PY) -m pytest -q tests $(ARGS)

lint: $(VENV)/dev.stamp  ## Check the style of notebooks, tests and tools (ruff.toml)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

test-slow: $(VENV)/dev.stamp  ## Run the cells and tests marked slow, too
	$(PY) tools/run_notebooks.py --flags slow
	$(PY) -m pytest -q tests -m slow $(ARGS)

# The environments are built anew each time: what is newest changes from day to day.
test-newest:  ## Test with the newest releases that settings.ini allows, in .venv-newest
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest VERSIONS=.newest.tmp

test-lowest:  ## Test with the lowest releases that settings.ini allows, in .venv-lowest
	rm -rf .venv-lowest
	$(MAKE) test VENV=.venv-lowest VERSIONS=.lowest.tmp

lock:  ## Write requirements.lock anew: the newest releases that settings.ini allows
	$(PYTHON) tools/lock.py

notebooks: $(VENV)/dev.stamp  ## Export, run and clean the notebooks, keeping their outputs (NB=nbs/01_data.ipynb for one)
	$(PY) tools/refresh_outputs.py $(NB)

lab: $(VENV)/dev.stamp  ## Open the notebooks in JupyterLab
	$(PY) -m jupyterlab nbs

bench: $(VENV)/dev.stamp  ## Measure speed and memory
	$(PY) benchmarks/bench.py $(ARGS)

results: $(VENV)/dev.stamp  ## Make the table of what is there; with DATA=Flickr8k TOWERS=... WORK=... train what is missing first
	$(PY) benchmarks/results.py $(DATA) $(TOWERS) $(WORK)

clean:  ## Remove what builds and tests leave behind (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache _proc .venv-newest .venv-lowest .newest.tmp .lowest.tmp
	find clipcap nbs tests tools benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("clipcap needs Python 3.10 or newer, and $(PYTHON) is " + \
	  sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3")'
	@"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) could not make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

.newest.tmp:
	@touch $@

.lowest.tmp: settings.ini tools/versions.py
	@"$(PYTHON)" tools/versions.py lowest > $@

# setuptools first, and no isolated build: pip would fetch whatever setuptools is newest for that, past the lock
$(VENV)/user.stamp: settings.ini setup.py $(VERSIONS) | $(PY)
	@echo "Installing clipcap and what it needs into $(VENV): once, some minutes" >&2
	@$(INSTALL) $(LOCKED) setuptools wheel
	@$(INSTALL) $(LOCKED) --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: settings.ini setup.py $(VERSIONS) | $(PY)
	@echo "Installing clipcap and its developers' tools into $(VENV): once, some minutes" >&2
	@$(INSTALL) $(LOCKED) setuptools wheel
	@$(INSTALL) $(LOCKED) --no-build-isolation --editable '.[dev]'
	@touch $(VENV)/user.stamp $@
