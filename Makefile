# Everything happens in .venv, with the exact versions of requirements/. `make help` lists the targets.
# `make test TRIO=2.11` takes the torch, FBGEMM and TorchRec of requirements/trio-2.11.txt, in .venv-2.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

TRIO ?= 2.13
LOCK := requirements/trio-$(TRIO).txt
$(if $(wildcard $(LOCK)),,$(error TRIO=$(TRIO): allowed are $(patsubst requirements/trio-%.txt,%,$(wildcard requirements/trio-*.txt))))
VENV := .venv$(addprefix -,$(filter-out 2.13,$(TRIO)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
# The CUDA set where a driver answers, else the CPU set; `make test DEVICE=cpu` overrides.
ifndef DEVICE
DEVICE := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
endif
# `make test PYTHON=/path/to/python`; by default the newest on PATH that is new enough.
PYTHON ?=
# `make test PYTEST_ARGS="tests/test_doctor.py -x"`
PYTEST_ARGS ?=
# Three processes keep two cores busy, because tests wait for those that they start. The tests of a file stay in one,
# because several share a program that runs for a minute.
PARALLEL ?= -n 3 --dist loadfile
# Of `make train`. Two ranks, or one for the only GPU; the CPU set is not held to the number of GPUs.
CONFIG ?= configs/demo.yaml
RANKS ?= $(if $(filter cuda,$(DEVICE)),$(shell nvidia-smi -L | head -n 2 | wc -l),2)
HIDE_GPUS := $(if $(filter cpu,$(DEVICE)),CUDA_VISIBLE_DEVICES=-1)

LOCKED := $(VENV)/.locked-$(DEVICE)
INSTALLED := $(VENV)/.installed-$(DEVICE)
DOCS_INSTALLED := $(VENV)/.docs-installed-$(DEVICE)
# Linters of files that are not Python have an environment of their own, since no job needs their 100 MB.
LINTERS := .venv-linters
WHEEL_INSTALLED := $(VENV)/.wheel-installed-$(DEVICE)
# The trios beside which `make test-wheel` installs the wheel.
WHEEL_TRIOS ?= 2.11 2.13 2.14

.PHONY: help install packages test test-slow test-all test-gpu test-slurm test-ray test-two-hosts test-docs test-wheel drill train \
    docs wheel sdist lint format typecheck ci clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED)  ## Create .venv: the locked versions and this package

packages: $(LOCKED)  ## Create .venv without this package

# On the CPU, whatever the machine has: jobs that the tests start on two ranks would look for two GPUs.
test: $(INSTALLED)  ## Run the tests that guard values, on the CPU: five minutes on two cores
	CUDA_VISIBLE_DEVICES=-1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-slow: $(INSTALLED)  ## Run the tests that are marked slow, on the CPU
	CUDA_VISIBLE_DEVICES=-1 $(BIN)/python -m pytest $(PARALLEL) -m slow $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## Run all tests, on the CPU
	CUDA_VISIBLE_DEVICES=-1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-gpu: $(INSTALLED)  ## Run the tests of GPUs, on the GPUs of this machine
	TORCHREC_QR_GPU_TESTS_DEVICE=cuda $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

# These three need root: clusters start jobs as their users, and namespaces are the kernel's. Each undoes what it did.
test-slurm: $(INSTALLED)  ## Run jobs on a Slurm cluster of two nodes, set up on this host (root; Debian, Ubuntu)
	trap 'scripts/slurm_cluster.sh down' EXIT; scripts/slurm_cluster.sh up; eval "$$(scripts/slurm_cluster.sh env)"; \
	TORCHREC_QR_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm $(PYTEST_ARGS)

test-ray: $(INSTALLED)  ## Run jobs on a Ray head, set up on this host (root)
	trap 'scripts/ray_head.sh down' EXIT; VENV=$(VENV) scripts/ray_head.sh up; \
	TORCHREC_QR_TEST_RAY=1 scripts/ray_head.sh run $(VENV)-ray/bin/python -m pytest tests/ray $(PYTEST_ARGS)

test-two-hosts: $(INSTALLED)  ## Run a job on two network namespaces, and cut the link between them (root)
	TORCHREC_QR_TEST_TWO_HOSTS=1 $(BIN)/python -m pytest tests/two_hosts $(PYTEST_ARGS)

# A page that is no longer built must not stay; screenshots lie in build/screenshots.
test-docs: $(DOCS_INSTALLED)  ## Build the site of docs/ anew and follow every link in headless Chromium
	rm -rf build/docs build/screenshots
	$(MAKE) docs
	TORCHREC_QR_TEST_SITE=1 $(BIN)/python -m pytest tests/site $(PYTEST_ARGS)

drill: $(INSTALLED)  ## Lose ranks, links and hosts of a job of eight ranks on four namespaces, 20 times (root)
	$(BIN)/python -m benchmarks.fault_drills --save

# TorchX's own notes at each start are left out; what fails is shown.
train: $(INSTALLED)  ## Train a job on this machine: CONFIG=configs/demo.yaml RANKS=2
	$(HIDE_GPUS) $(BIN)/torchx --log_level WARNING run -s local_cwd launch/components.py:dlrm -j 1x$(RANKS) --config $(CONFIG)

# The checkout is Sphinx's source, so that links from docs/ to other files work; docs/conf.py names what it reads.
docs: $(DOCS_INSTALLED)  ## Build the site of docs/ into build/docs; a warning is an error
	CUDA_VISIBLE_DEVICES=-1 $(BIN)/python -m sphinx -q -b html -c docs -j auto -W --keep-going . build/docs
	@echo "The site's first page: build/docs/docs/index.html"

wheel: $(WHEEL_INSTALLED)  ## Build dist/*.whl, with both libraries, from dist/*.tar.gz, which it builds too (g++)
	VENV=$(VENV) scripts/build_wheel.sh

sdist: $(WHEEL_INSTALLED)  ## Build dist/*.tar.gz alone
	@rm -f dist/torchrec_qr-*.tar.gz
	$(BIN)/python -m build --no-isolation --sdist

test-wheel: wheel  ## Install the wheel beside each trio, without a compiler, and run the README's example
	for trio in $(WHEEL_TRIOS); do $(MAKE) packages TRIO=$$trio; done
	TORCHREC_QR_TEST_WHEEL="$$(echo dist/*.whl)" TORCHREC_QR_TEST_WHEEL_TRIOS="$(WHEEL_TRIOS)" CUDA_VISIBLE_DEVICES=-1 \
	    $(BIN)/python -m pytest -n 2 tests/wheel $(PYTEST_ARGS)

lint: $(INSTALLED) $(LINTERS)/.locked  ## Check style, and the files that GitHub, Docker and citations read
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(LINTERS)/bin/hadolint Dockerfile
	$(LINTERS)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(LINTERS)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(LINTERS)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(LINTERS)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(INSTALLED)  ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## Check types
	$(BIN)/mypy

ci:  ## Run what CI runs
	bash .ci/run

clean:  ## Remove .venv and its like, caches and build outputs
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis test*-results.xml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A new lock gets a new venv, as pip leaves in place what a lock no longer names. The stamp comes last, so an install
# that was interrupted starts over. TorchRec goes in with --no-deps: on every machine it asks for the CUDA build of FBGEMM.
$(LOCKED): requirements/base.txt requirements/torchrec.txt requirements/$(DEVICE).txt $(LOCK)
	@.ci/create_venv $(VENV) $(PYTHON)
	@echo "Installing the $(DEVICE) set of requirements/ for torch $(TRIO), once; this takes some minutes."
	@$(PIP) -r requirements/$(DEVICE).txt -c $(LOCK)
	@$(PIP) --no-deps -r requirements/torchrec.txt -c $(LOCK)
	@touch $@

$(LINTERS)/.locked: requirements/linters.txt
	@.ci/create_venv $(LINTERS) $(PYTHON)
	@$(LINTERS)/bin/python -m pip install --disable-pip-version-check -qq -r requirements/linters.txt
	@touch $@

$(INSTALLED): $(LOCKED) pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED) requirements/docs.txt
	@$(PIP) --no-deps -r requirements/docs.txt
	@touch $@

$(WHEEL_INSTALLED): $(INSTALLED) requirements/wheel.txt
	@$(PIP) --no-deps -r requirements/wheel.txt
	@touch $@
