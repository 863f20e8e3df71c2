# Two commands for a fresh machine with Python 3.11 or newer: `make describe` and `make test`. README.md has them in pip's words.
PYTHON ?= python3
VENV ?= .venv
pip = $(VENV)/bin/pip install --quiet --constraint constraints.txt

.PHONY: describe test constraints

describe: $(VENV)/package # set up, then the checkpoint in examples/ describes a picture
	$(VENV)/bin/python examples/describe.py

test: $(VENV)/tests # set up, then all tests
	$(VENV)/bin/pytest tests

constraints: # resolve again what the tests take, without the present pins
	$(PYTHON) -m venv --clear $(VENV)/new
	$(VENV)/new/bin/pip install --quiet --editable ".[test]"
	$(VENV)/new/bin/pip install --quiet --no-deps lmms-eval
	$(VENV)/new/bin/pip freeze --exclude-editable > constraints.txt
	rm -r $(VENV)/new

$(VENV)/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(pip) --editable .
	touch $@

$(VENV)/tests: $(VENV)/package # lmms-eval without what it asks for: the tests use a small part, which the extra names
	command -v chromium chromium-browser google-chrome || apt-get install --yes chromium # for the tests of pages
	$(pip) --editable ".[test]"
	$(pip) --no-deps lmms-eval
	touch $@
