# Everything runs in environments of its own; nothing is installed outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint docs bench leaderboard solvers mutants clean

## The demonstration: a bundled teacher made fast by several methods, and a page that shows it (about five minutes).
demo: $(VENV)/core
	$(BIN)/fewstep demo --out report.html

## All tests, a process a core (about nine minutes on two).
test: $(VENV)/test
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

## Style, types, the direction of imports and the house rules that can be counted.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py
	$(BIN)/python tools/check_house.py

## The documentation site, in site/.
docs: $(VENV)/docs
	$(BIN)/python tools/make_docs.py
	$(BIN)/mkdocs build --strict

## Speed, as ratios in one run.
bench: $(VENV)/test
	$(BIN)/python benchmarks/speed_samplers.py
	$(BIN)/python benchmarks/speed_training.py
	$(BIN)/python benchmarks/speed_passes.py
	$(BIN)/python benchmarks/speed_fixed.py

## Everything that can be trained, from one teacher in one budget over three seeds: a table and a plot in site/leaderboard
## (less than two hours on two cores; again it goes on where it was stopped).
leaderboard: $(VENV)/test
	mkdir -p site/leaderboard
	$(BIN)/python benchmarks/leaderboard.py --runs site/leaderboard/runs --out site/leaderboard/digits.json

## Error against calls for every solver: tables and pictures in site/solvers (about three minutes).
solvers: $(VENV)/test
	$(BIN)/python benchmarks/solvers.py --n 128 --out site/solvers

## Can the tests fail?  200 random one-token mutants of the mathematics, and those that no test notices (again with the
## same seed it goes on where it was stopped; more in docs/mutants.md).
mutants: $(VENV)/test
	$(BIN)/python tools/mutants.py --resume $(MUTANTS)

clean:
	rm -rf $(VENV) site build .mutants src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fewstep needs Python 3.11 or newer; say which one with: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# k-diffusion is a referee of the tests: one file of it, without the packages it pulls in.
$(VENV)/test: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@
