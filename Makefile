# `make demo` on a fresh machine installs everything into .venv first. `PYTHON` picks the
# interpreter for a new environment, `VENV` another folder for it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
TESTS ?=
WORKERS ?= 2
OUT ?= demo

PARALLEL := -n $(WORKERS) --dist worksteal

SOURCES := embcomp models data_pipelines search tests benchmarks docs

.PHONY: demo test test-long test-spark test-ray test-fast test-second-set test-lowest check fix bench bench-quality docs install clean-venv

## Raw Criteo-format logs -> three trained models -> one table, one page, one picture.
demo: $(VENV)/.installed
	$(BIN)/embcomp demo --out $(OUT) $(if $(DATA),--data $(DATA))

## Every rule: some 17 minutes on two cores. `WORKERS` says how many tests run at once.
test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not long"

## Kill loops (`EMBCOMP_TEST_KILLS`), and the rest of the larger matrices of cases.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m long

## What a real Spark writes (`pip install pyspark`, and Java: Debian's openjdk-17-jre-headless), taken as it is.
test-spark: $(VENV)/.installed-spark
	$(BIN)/python -m pytest tests/data_pipelines/test_spark.py

## `prepare` on a real cluster of Ray, of several nodes on 127.0.0.1, one of which is killed.
test-ray: $(VENV)/.installed-ray
	$(BIN)/python -m pytest tests/data_pipelines/test_ray_engine.py

## What starts no process and trains nothing: under two minutes on two cores.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

## The suite on torch 2.14, torchrec 1.9 and fbgemm 1.9; `TESTS` picks a part of it.
test-second-set: $(VENV)-2.14/.installed-second
	$(VENV)-2.14/bin/python -m pytest $(PARALLEL) -m "not long" $(TESTS)

## Data, configs and the command on the lowest versions that pyproject.toml admits.
test-lowest: $(VENV)-lowest/.installed-lowest
	$(VENV)-lowest/bin/python -m pytest $(PARALLEL) -m "not long" $(or $(TESTS),tests/data_pipelines tests/config tests/cli)

check: $(VENV)/.installed
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

fix: $(VENV)/.installed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/lookup.py
	$(BIN)/python benchmarks/long_bags.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/codes.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/swaps.py
	$(BIN)/python benchmarks/delta_size.py
	$(BIN)/python benchmarks/verify_load.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/search_speed.py
	$(BIN)/python benchmarks/supernet_speed.py

## Quality over seeds and budgets on generated logs: an hour on two cores.
bench-quality: $(VENV)/.installed
	test -f runs/quality/raw.txt || $(BIN)/embcomp generate runs/quality/raw.txt --scale 0.01
	test -f runs/quality/data/dataset.json || \
		$(BIN)/embcomp prepare criteo runs/quality/raw.txt runs/quality/data
	$(BIN)/python benchmarks/quality.py configs/criteo_autoint_full.yaml \
		--methods hash,qr,unified --budgets 50%,10% data.path=runs/quality/data

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

install: $(VENV)/.installed

# An environment that already works (made by hand, or by another run) is taken as it is: pip finds
# everything satisfied. The stamp makes later calls free until the requirements change.
$(VENV)/.installed: requirements-cpu.txt pyproject.toml packaging/fbgemm-gpu-shim/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-cpu.txt
	$(BIN)/python -m pip check
	touch $@

$(VENV)-2.14/.installed-second: requirements-cpu-2.14.txt pyproject.toml packaging/fbgemm-gpu-shim-1.9/pyproject.toml
	test -x $(VENV)-2.14/bin/python || $(PYTHON) -m venv $(VENV)-2.14
	$(VENV)-2.14/bin/python -m pip install --quiet -r requirements-cpu-2.14.txt
	$(VENV)-2.14/bin/python -m pip check
	touch $@

$(VENV)-lowest/.installed-lowest: requirements-cpu.txt .ci/lowest.txt pyproject.toml
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c .ci/lowest.txt -r requirements-cpu.txt
	$(VENV)-lowest/bin/python -m pip check
	touch $@

$(VENV)/.installed-spark: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pyspark==4.3.0
	touch $@

$(VENV)/.installed-ray: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet ray==2.60.0
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

clean-venv:
	rm -rf $(VENV) $(VENV)-2.14 $(VENV)-lowest
