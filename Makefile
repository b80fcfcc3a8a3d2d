# Two commands do all the set-up: `make train` and `make test`. They need Python 3.11 or newer and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= examples/quickstart.toml
FOLDERS := cluster faulttol kernels models parallel runtime tests benchmarks examples

.PHONY: train test test-all lint types bench wheel clean

train: $(VENV)/.installed
	$(BIN)/rayfold train $(CONFIG) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

# The long campaigns, which `make test` only samples.
test-all: $(VENV)/.installed-dev
	$(BIN)/pytest -m 'campaign or not campaign' $(ARGS)

lint: $(VENV)/.installed-dev types
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/ruff check $(FOLDERS)

# mypy names modules after folders: a link gives the checkout the package's name, whatever the checkout is called.
types: $(VENV)/.installed-dev
	mkdir -p build/types && ln -sfn ../.. build/types/rayfold
	cd build/types && ../../$(BIN)/mypy -p rayfold.cluster -p rayfold.faulttol -p rayfold.kernels \
		-p rayfold.models -p rayfold.parallel -p rayfold.runtime

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/snapshot.py
	$(BIN)/python benchmarks/recovery.py --pairs 1
	$(BIN)/python benchmarks/checkpoints.py --pairs 1
	$(BIN)/python benchmarks/protection.py --pairs 1

wheel: $(VENV)/.installed-dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + \
		"; say which to use: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
