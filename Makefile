# `make quickstart` is the first thing to run; `make test` is what CI runs. With LOCKED=1, a new environment gets the exact versions
# of requirements/*.lock.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two at a time, a file's tests together: they wait for starting engines more than they compute.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: quickstart test test-unit test-integration test-full chaos soak lint format fuzz mutants bench settings lock clean

quickstart: $(STAMP)  ## prepare a tiny teacher, distil a student from it, write runs/quickstart/report.html
	@test ! -e runs/quickstart || { echo "runs/quickstart holds an earlier run."; \
		echo "To continue it: $(BIN)/kdray run configs/quickstart.yaml --resume. To begin anew: rm -r runs/quickstart"; exit 2; }
	$(BIN)/kdray run configs/quickstart.yaml

test: lint test-unit test-integration  ## what CI runs

test-unit: $(STAMP)  ## seconds, no Ray
	$(PYTEST) tests/unit -m "not full"

test-integration: $(STAMP)  ## real engines on tiny models, minutes
	$(PYTEST) tests/integration -m "not full"

test-full: $(STAMP) lint  ## adds the longer tests; with RESUME=1, leaves out what passed before an interruption
	$(PYTEST) -p tests.support.passed --passed $(if $(RESUME),resume,new) tests/unit
	$(PYTEST) -p tests.support.passed --passed $(if $(RESUME),resume,new) tests/integration

chaos: $(STAMP)  ## 100 faults on one run, real engines; MINUTES=8 ends a part with 3 after that time, RESUME=1 goes on
	$(BIN)/python -m tests.soak.chaos --seed 0 --faults 100 --folder runs/chaos $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(RESUME),--resume)

soak: $(STAMP)  ## growth of every process and of what a run keeps elsewhere, over two hours or MINUTES; RESUME=1 goes on
	$(BIN)/python -m tests.soak.soak --minutes $(or $(MINUTES),120) --folder runs/soak $(if $(RESUME),--resume)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(STAMP)  ## new mutations of configs and files, twenty times as many as the tests have
	KDRAY_FUZZ=20 $(BIN)/python -m pytest tests/unit/whole/test_fuzz.py -q

mutants: $(STAMP)  ## small faults in the mathematics that no unit test notices; an hour, goes on after an interruption (MINUTES=7)
	$(BIN)/pip install -q --no-deps --upgrade --target build/mutmut -r requirements/mutants.txt
	PYTHONPATH=build/mutmut OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants --minutes $(or $(MINUTES),600)
	PYTHONPATH=build/mutmut $(BIN)/python -m benchmarks.mutants --report --commit $$(git rev-parse --short HEAD)

bench: $(STAMP)  ## all benchmarks of speed, on an idle machine; writes benchmarks/results/bench_DATE.json
	$(BIN)/python -m benchmarks.bench

settings: $(STAMP)  ## write docs/settings.md anew, from the docstrings of kdray/config
	$(BIN)/python -m docs.settings

lock:  ## write requirements/*.lock anew; LOCK_FLAGS=--upgrade takes the newest versions that pyproject.toml admits
	PYTHON=$(PYTHON) requirements/lock.sh $(LOCK_FLAGS)

$(STAMP): pyproject.toml setup.sh $(if $(LOCKED),$(wildcard requirements/*.lock))
	PYTHON=$(PYTHON) ./setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
