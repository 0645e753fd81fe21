# Everything a fresh machine needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check format bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

demo: $(STAMP)  ## the main job on the embedded miniature
	$(BIN)/expunge demo -o demo-run

test: $(STAMP)  ## the default suite: no GPU, no hub, no network
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(STAMP)  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## engine against a textbook loop; writes results/engine.json
	$(BIN)/python benchmarks/engine.py --out results/engine.json

clean:
	rm -rf $(VENV) demo-run build dist *.egg-info
