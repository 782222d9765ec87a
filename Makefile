PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A test is small: one thread each, and a process per core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all lint types clean bench-env

demo: $(STAMP)
	$(BIN)/python examples/demo.py --output output
	$(BIN)/python examples/demo_preconditioners.py --output output

test: $(STAMP) lint types
	$(PYTEST) -m 'not slow'

# The long grids too.
test-all: $(STAMP) lint types
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# operators/ and solvers/ live inside llqr_mf once installed, so mypy reads an installed layout.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	cp -r llqr_mf build/types/ && cp -r operators solvers build/types/llqr_mf/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p llqr_mf

# One resolver call, and the pins: a second call upgraded torch once.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=24' 'setuptools>=77'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Peers, without the torchvision that some would pull.
bench-env: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m pip install -q --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 mpc==0.0.6 pytorch_optimizer==4.1.0

clean:
	rm -rf $(VENV) build *.egg-info
