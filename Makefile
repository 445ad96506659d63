# What one types. Each target does its own set-up; `make` alone prints this help.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test types test-a-to-f test-g-to-z test-node coverage format .venv

help:
	@echo "make demo      train on the sample data, segment, write demo/report.html (about four minutes on 2 cores)"
	@echo "make test      format, lint, types, tests"
	@echo "make coverage  the tests again, one after the other, and which lines they reach"
	@echo "make format    put the code into shape"
	@echo "make .venv     only the virtual environment, from constraints.txt"

.venv: .venv/ready

# written last: an installation that broke off is begun again
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hospital]'
	@touch $@

demo: .venv
	$(BIN)/medseg demo -o demo

test: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# many tests wait for other processes: three runs side by side fill two cores. Threads that wait must not take
	@# the processor from the other runs meanwhile
	OMP_WAIT_POLICY=passive $(MAKE) --jobs=3 --output-sync=line types test-a-to-f test-node test-g-to-z

types: .venv
	$(BIN)/mypy

test-a-to-f: .venv
	$(BIN)/pytest -p no:cacheprovider tests/test_[a-f]*.py

test-g-to-z: .venv
	$(BIN)/pytest -p no:cacheprovider $(filter-out tests/test_hospital_%,$(wildcard tests/test_[g-z]*.py))

test-node: .venv
	$(BIN)/pytest -p no:cacheprovider tests/test_hospital_*.py

coverage: .venv
	$(BIN)/pytest --cov --cov-report=term

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
