# One line per job, over the `megatron-cpt` command. `make` alone prints this help.
SHELL  := bash
SIZE   ?= 135m
CONFIG ?= examples/qwen2_72b/config.yaml
TO     ?= hf
BIN    := .venv/bin

.PHONY: help setup wheelhouse quickstart preprocess plan train convert chat report eval tasks test test-fast test-matrix test-gpu test-slurm web check docs clean
.DEFAULT_GOAL := help

help:         ## this help
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1  /' | awk '{printf "  %s %-11s ", $$1, $$2; $$1=$$2=""; print}'

setup:        ## create .venv and install: [PYTHON=python3.12] [TORCH=system] [WHEELHOUSE=folder] [EXTRAS=dev,quickstart]
	@python=$$(TORCH=$(TORCH) tools/find_python.sh "$(PYTHON)") && $$python tools/setup_venv.py \
	  $(if $(PYTHON),--python-was-named) $(if $(TORCH),--torch $(TORCH)) \
	  $(if $(WHEELHOUSE),--wheelhouse $(WHEELHOUSE)) $(if $(EXTRAS),--extras $(EXTRAS))

wheelhouse:   ## all wheels in one folder, for a machine without a network: [WITHOUT=torch] [EXTRAS=...] [DIR=wheelhouse]
	@python=$$(tools/find_python.sh "$(PYTHON)") && $$python tools/wheelhouse.py --to $(or $(DIR),wheelhouse) \
	  $(if $(WITHOUT),--without $(WITHOUT)) $(if $(EXTRAS),--extras $(EXTRAS))

quickstart: setup  ## the whole job on a real 135M model and real text; SIZE=tiny for two minutes
	$(BIN)/python examples/quickstart/quickstart.py --size $(SIZE)

# The shipped example corpora derive their raw text from packages first; your own needs nothing.
EXAMPLE := $(patsubst examples/%/corpus.yaml,%,$(filter examples/%/corpus.yaml,$(CORPUS)))

RAW_TEXT := $(patsubst %,data/%/$(if $(filter technical,$(EXAMPLE)),html,raw.jsonl),$(EXAMPLE))

data/%/raw.jsonl data/%/html:
	$(BIN)/python examples/prepare_corpus.py $*

preprocess: setup $(RAW_TEXT)  ## tokenise a corpus: make preprocess CORPUS=examples/medical/corpus.yaml
	$(BIN)/megatron-cpt preprocess $(or $(CORPUS),$(error say which corpus: make preprocess CORPUS=corpus.yaml))

plan: setup  ## validate a config and print its numbers: make plan CONFIG=config.yaml
	$(BIN)/megatron-cpt plan $(CONFIG)

train: setup  ## start or continue a run: make train CONFIG=config.yaml
	$(BIN)/megatron-cpt train $(CONFIG)

convert: setup  ## export a run to Hugging Face: make convert RUN=runs/JOB [OUT=folder] [TO=hf]
	$(BIN)/megatron-cpt convert $(or $(RUN),$(error say which run: make convert RUN=runs/JOB)) $(or $(OUT),$(RUN)/export/$(TO)) --to $(TO)

tasks: setup  ## downstream tasks before and after: make tasks RUN=runs/JOB BASE=dir TASKS=pubmedqa,my.yaml
	$(BIN)/megatron-cpt eval tasks $(or $(RUN),$(error say which run: make tasks RUN=runs/JOB TASKS=...)) --tasks $(or $(TASKS),$(error say which tasks: make tasks RUN=... TASKS=pubmedqa)) $(if $(BASE),--base $(BASE))

chat: setup  ## talk to a run's model, beside the one it came from: make chat RUN=runs/JOB
	$(BIN)/megatron-cpt chat $(or $(RUN),$(error say which run: make chat RUN=runs/JOB)) --compare

report: setup  ## one page on what a run gained, lost and cost: make report RUN=runs/JOB
	$(BIN)/megatron-cpt report $(or $(RUN),$(error say which run: make report RUN=runs/JOB))

eval: setup  ## perplexity of a model: make eval MODEL=dir DATA=prefix-or-text
	$(BIN)/megatron-cpt eval perplexity $(or $(MODEL),$(error say which model: make eval MODEL=dir DATA=prefix)) --data $(or $(DATA),$(error say which data: make eval MODEL=dir DATA=prefix))

test: setup  ## all tests
	$(BIN)/python -m pytest

test-fast: setup  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow' tests/unit

test-matrix: setup  ## parity, resume and conversion under each Python and Megatron-Core: [ONLY=mcore0.19] [FOLDER=.matrix]
	$(BIN)/python tests/matrix/run.py --only '$(ONLY)' $(if $(FOLDER),--folder $(FOLDER))

test-gpu: setup  ## one GPU against the CPU path, in one table; skipped with the reason where there is none
	$(BIN)/python tests/gpu/run.py

web: setup    ## the page that watches and starts runs, in a browser: [ROOT=runs] [PORT=8765]
	$(BIN)/megatron-cpt web $(or $(ROOT),$(if $(wildcard .quickstart),.quickstart,runs)) $(if $(PORT),--port $(PORT)) --allow .

test-slurm: setup  ## the life of a job on a real Slurm, brought up here in network namespaces; needs root, Debian and apt
	$(BIN)/python -m pytest tests/slurm

check: setup  ## format, lint and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: setup  ## write docs/config.md from the schema
	$(BIN)/python docs/generate.py

clean:  ## forget the quickstart, caches and the virtual environment; runs/ and data/ stay
	rm -rf .quickstart .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
