# Every target sets up what it needs: a virtual environment with the pinned packages that CI uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint typecheck clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	mkdir -p outputs
	$(BIN)/wan-ar generate --prompt "a red circle moving right on a navy background" --seed 0 --contact-sheet \
		--output outputs/demo.mp4
	$(BIN)/wan-ar generate --prompt "0: a red circle moving right on a navy background" \
		--prompt "4s: a green cross moving right on a navy background" \
		--prompt "8s: a yellow square moving up on a black background" --seed 0 --contact-sheet \
		--output outputs/demo-prompts.mp4

test: $(READY)
	$(BIN)/pytest --numprocesses 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(READY)
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p wan_autoregressive

check: lint typecheck test

clean:
	rm -rf build dist outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
