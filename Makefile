# Two commands: "make demo" and "make test". "make help" lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETTINGS := settings.ini setup.py pyproject.toml constraints.txt
NB ?= $(wildcard nbs/*.ipynb)
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

.PHONY: help demo test export notebooks readme lab constraints clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 14

demo: $(VENV)/ready-to-run  ## Set up, then fine-tune the shipped model: data to merged model, about a minute
	$(BIN)/finetuning-kit demo $(ARGS)

# Several tests at once, each on one thread: models this small gain little from a second one, and with two threads on
# two cores that something else uses too, a step of training was measured to take seven times as long.
test: $(VENV)/ready-to-test  ## Set up as for the demo, add the tools of the tests, and run all tests (ARGS="-k layers")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

export: $(VENV)/ready-to-test  ## Export the chapters to finetuning_kit/
	$(BIN)/nbdev-export

notebooks: $(VENV)/ready-to-test  ## Run chapters from a fresh kernel and store their outputs (NB="nbs/001_config.ipynb")
	$(BIN)/python -m tests.notebooks --store $(NB)

readme: $(VENV)/ready-to-test  ## Render nbs/index.ipynb to README.md
	$(BIN)/python -m tests.notebooks --readme

lab: $(VENV)/ready-to-test  ## Open the chapters in JupyterLab
	$(BIN)/jupyter lab nbs

constraints:  ## Pin today's versions for the Pythons that are there (PYTHONS="python3.11")
	$(PYTHON) .ci/constraints.py $(PYTHONS) > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove the environment and what was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis finetuning_kit/_modidx.py
	find finetuning_kit tests .ci -name __pycache__ -prune -exec rm -rf {} +

# The set-up. It is done once; it runs again when one of the settings has changed. setuptools comes first so that
# nothing is built in isolation, which would want the network each time. The tests try the panels on ipywidgets 7 too,
# which Colab has: it lies in a folder of its own, beside the packages.
$(VENV)/ready-to-run: $(SETTINGS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'finetuning_kit needs Python 3.10 or newer; `$(PYTHON)` is not. Try: make PYTHON=python3.11 $(MAKECMDGOALS)' >&2; exit 2; }
	@echo 'Installing into $(VENV): a few minutes the first time, most of it for torch.'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel
	$(PIP) install --quiet --no-build-isolation --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/ready-to-test: $(VENV)/ready-to-run Makefile
	$(PIP) install --quiet --no-build-isolation --constraint constraints.txt --editable '.[all,dev]'
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/ipywidgets7 ipywidgets==7.7.1 ipython-genutils==0.2.0
	@touch $@
