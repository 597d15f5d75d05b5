# Two commands do everything: `make demo` and `make test`. Both prepare the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two busy pools of threads on few cores slow each other down; waiting threads should sleep.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint env clean

demo: $(VENV)/.ready
	$(BIN)/python examples/train_digits.py out/demo/dense.safetensors
	$(BIN)/widthkit slim timm/resnet10t --weights out/demo/dense.safetensors --data digits --image-size 32 \
	  --budget 0.1x --k 8 --min-width 0.05x --final-epochs 4 --batch-size 64 --seeds 3 --compare importance \
	  --out out/demo/slim --resume

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
