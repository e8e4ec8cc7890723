# `make train` and `make test` need nothing but Python 3.11 or newer; they make a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
SCRIPT ?= ppo_continuous.py
ARGS ?= --env-id HalfCheetah-v4
# Bytecode takes longer to make than packages to unpack; what is imported has it made then, where that is allowed.
LAZILY = $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: train test docs family
train: $(VENV)/train
	$(VENV)/bin/python $(SCRIPT) $(ARGS)

test: $(VENV)/dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

docs: $(VENV)/docs # the site, in site/
	$(VENV)/bin/mkdocs build --strict

family: # copies the blocks that scripts share; the tests hold that they are the same
	$(PYTHON) tools/family.py

$(VENV)/train: EXTRAS =
$(VENV)/dev: EXTRAS = [dev]
$(VENV)/docs: EXTRAS = [docs]
$(VENV)/train $(VENV)/dev $(VENV)/docs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(LAZILY) --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $@
