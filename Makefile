# Everything runs in .venv, which `make demo` (users) and `make test` (developers) build from Python alone.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow notebooks lab bench results clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r t h; do printf 'make %-10s  %s\n' "$$t" "$$h"; done

demo: .venv/user.stamp  ## Caption a few photos with the bundled model, offline
	@.venv/bin/clipcap demo

test: .venv/dev.stamp  ## Check that the notebooks are clean, run each one, then pytest (ARGS=... for pytest)
	$(PY) tools/run_notebooks.py
	$(PY) -m pytest -q tests $(ARGS)

test-slow: .venv/dev.stamp  ## Run the cells and tests marked slow, too
	$(PY) tools/run_notebooks.py --flags slow
	$(PY) -m pytest -q tests -m slow $(ARGS)

notebooks: .venv/dev.stamp  ## Export, run and clean the notebooks, keeping their outputs (NB=nbs/01_data.ipynb for one)
	$(PY) tools/refresh_outputs.py $(NB)

lab: .venv/dev.stamp  ## Open the notebooks in JupyterLab
	$(PY) -m jupyterlab nbs

bench: .venv/dev.stamp  ## Measure speed and memory
	$(PY) benchmarks/bench.py $(ARGS)

results: .venv/dev.stamp  ## Train and score every family (DATA=Flickr8k's folder TOWER=a MobileNetV2 WORK=a folder)
	$(PY) benchmarks/results.py $(DATA) $(TOWER) $(WORK)

clean:  ## Remove what builds and tests leave behind (.venv stays)
	rm -rf build dist clipcap.egg-info .pytest_cache _proc
	find clipcap nbs tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("clipcap needs Python 3.10 or newer, and $(PYTHON) is " + \
	  sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3")'
	@"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; \
	  echo "$(PYTHON) could not make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

.venv/user.stamp: settings.ini setup.py | $(PY)
	@echo "Installing clipcap and what it needs into .venv: once, some minutes" >&2
	@$(PIP) install --use-pep517 --editable .
	@touch $@

.venv/dev.stamp: settings.ini setup.py | $(PY)
	@echo "Installing clipcap and its developers' tools into .venv: once, some minutes" >&2
	@$(PIP) install --use-pep517 --editable '.[dev]'
	@touch .venv/user.stamp $@
