# `make demo` and `make test` set up everything they need on a machine with Python 3.11 or newer and gcc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help install demo study test test-local test-fast test-slurm test-parity lint format bench browser slurm clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed  ## Create .venv with pinned packages

# ColossalAI pins another torch, so it comes without its dependencies, in a second step.
$(VENV)/installed: pyproject.toml constraints.txt constraints-colossalai.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps -r constraints-colossalai.txt
	@touch $@

demo: install  ## The road to ChatGPT on two local ranks: pretraining, fine-tuning, a reward model, PPO
	$(BIN)/orch submit configs/chatgpt-demo.yaml --launcher local
	$(BIN)/python benchmarks/study.py --of runs/chatgpt-demo

study: install  ## The same for three seeds: what each stage learns, and how sure that is
	$(BIN)/python benchmarks/study.py

test: test-slurm test-local  ## Every test but those of test-parity

test-local: install browser  ## Those that need no Slurm
	$(BIN)/python -m pytest -m "not slurm and not parity"

test-fast: install  ## What takes under three minutes
	$(BIN)/python -m pytest -m "not slow and not slurm and not parity"

test-parity: install  ## Engines and layouts against plain PyTorch, on 2, 4 and 8 ranks; what the demo learns
	$(BIN)/python -m pytest -m parity

test-slurm: install slurm  ## Those on a real Slurm, which launch/slurmbox starts on this machine
	$(BIN)/python -m pytest -m slurm

lint: install  ## ruff, mypy, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: install  ## Let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## Measure, and print tables
	$(BIN)/python benchmarks/run.py

# The dashboard test looks at the real page. Without a browser it is skipped by name.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium: install it to run the dashboard test"

# launch/slurmbox runs Debian's Slurm. Without it, or without the right to install it, its tests are skipped by name.
SLURM := slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server iproute2
slurm:  ## Install what launch/slurmbox needs (apt; as root, or with sudo where that asks nothing)
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	for program in slurmctld slurmd srun munged slurmdbd mariadbd ip; do command -v $$program >/dev/null || lacks=$$program; done; \
	[ -z "$$lacks" ] && exit; \
	as=; [ "$$(id -u)" = 0 ] || as="sudo -n"; \
	if command -v apt-get >/dev/null && $$as true 2>/dev/null; then \
	  echo "no $$lacks: installing $(SLURM)"; \
	  $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null && exit; \
	fi; \
	echo "no $$lacks: its tests are skipped; as root: apt-get install --no-install-recommends $(SLURM)"

clean:  ## Remove what was built; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
