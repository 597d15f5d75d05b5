# Two commands do everything: `make demo` and `make test`. Both prepare the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two busy pools of threads on few cores slow each other down; waiting threads should sleep.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint env clean

demo: $(VENV)/.ready
	$(BIN)/widthkit slim torchvision/resnet18 --data digits --image-size 32 --budget 0.5x --strategy bc \
	  --searcher greedy --k 6 --min-width 0.25x --epochs 7 --final-epochs 5 --seeds 3 --batch-size 64 --lr 0.03 \
	  --out out/demo --resume

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: widthkit needs Python 3.10 or newer; call make PYTHON=python3.12, for example" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
