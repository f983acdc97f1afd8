# Every target sets up what it needs: a virtual environment with the pinned packages that CI uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The repository laid out as the package that it is, for type checkers and editors.
LINKS := build/typing/.made
PACKAGE := build/typing/wan_autoregressive
PYTEST := $(BIN)/pytest --numprocesses 2
# Tests that compare bits, or with recordings: they have to hold whatever kernels torch picks for a CPU.
EXACT := golden or test_rollout or streaming_vae or kv_cache or relative_positions or static_addresses or test_resume.py

.PHONY: demo serve docs gallery browser test test-browser test-kernels test-all test-plain-cpu check lint typecheck \
	train-demo clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(LINKS): $(READY) tools/typing_links.py core
	$(BIN)/python tools/typing_links.py
	touch $(LINKS)

demo: $(READY)
	mkdir -p outputs
	$(BIN)/wan-ar generate --prompt "a red circle moving right on a navy background" --seed 0 --contact-sheet \
		--output outputs/demo.mp4
	$(BIN)/wan-ar generate --prompt "0: a red circle moving right on a navy background" \
		--prompt "4s: a green cross moving right on a navy background" \
		--prompt "8s: a yellow square moving up on a black background" --seed 0 --contact-sheet \
		--output outputs/demo-prompts.mp4
	$(BIN)/python tools/demo_gif.py outputs/demo-prompts.mp4 outputs/demo.gif

serve: $(READY)
	$(BIN)/wan-ar serve

# Into build/site. A dead link, or a name of the API that is not there, is an error.
docs: $(READY) $(LINKS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Into outputs/gallery: the demo with the samplers, policies and presets that it makes sense for, on one page.
gallery: $(READY)
	$(BIN)/python tools/gallery.py outputs/gallery

train-demo: $(READY)
	$(BIN)/python -m examples.train_demo.train --output outputs/train-demo

test: $(READY) $(LINKS)
	$(PYTEST) -m "not slow"

test-all: $(READY) $(LINKS)
	$(PYTEST)

# What drives a Chromium that is installed (tools/install_browser.sh); it downloads none of its own. Where there is a
# Firefox, some of the tests are run in it too.
browser: $(VENV)/.browser

$(VENV)/.browser: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	touch $(VENV)/.browser

test-browser: $(VENV)/.browser $(LINKS)
	REQUIRE_BROWSER=1 $(BIN)/pytest -n 0 -s tests/integration/test_live_page*.py

# Triton's kernels in its interpreter, which needs no GPU: a process of its own, since the variable is read at import.
test-kernels: $(READY) $(LINKS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,triton]'
	TRITON_INTERPRET=1 $(BIN)/pytest -n 0 tests/gpu/test_triton_kernels.py

test-plain-cpu: $(READY) $(LINKS)
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m "not slow" -k "$(EXACT)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pyright does not look for files behind links to folders, so the folders are named to it.
typecheck: $(READY) $(LINKS)
	$(BIN)/mypy
	$(BIN)/basedpyright $(PACKAGE) $(PACKAGE)/*/ benchmarks examples tests tools

check: lint typecheck test-all test-plain-cpu

clean:
	rm -rf build dist outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
