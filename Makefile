# `make demo` and `make test` do all their own set-up in .venv; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
# The release that the declared range was tested with; another one of the range works as well:
# make test TORCH="torch==2.12.1"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := setup.cfg setup.py pyproject.toml $(wildcard hf_vqlogits/ops/csrc/* conversion/csrc/*)

.PHONY: demo test lint format wheel-test benchmarks-quick clean

$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,demo,bench]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --output demo-output

# One thread for each of the two processes: with more than there are cores, OpenMP's waiting loops
# make the suite ten times slower. No new process for one that ended amid a test: it would run that
# test again, and pytest-xdist may wait for it for ever.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# mypy reads the packages as they install. In the repository `hf_vqlogits.conversion` stands beside
# `hf_vqlogits`, where mypy would not find it and believe whatever the benchmarks do with it.
TYPED := $(VENV)/typed
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/hf_vqlogits
	ln -s $(CURDIR)/hf_vqlogits/* $(CURDIR)/conversion $(TYPED)/hf_vqlogits/
	ln -s $(CURDIR)/benchmarks $(TYPED)/
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml
	$(BIN)/python -m benchmarks.tables --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel, built from the sdist and used from an empty folder, where no checkout can hide a gap.
wheel-test: $(INSTALLED)
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/python tests/check_wheel.py dist

# That the benchmarks run; their figures mean nothing. They read models and texts that are no part
# of the repository.
SHARED ?= ../shared
QUICK := --quick --data $(SHARED)/data --models $(SHARED)/models
benchmarks-quick: $(INSTALLED)
	@if [ ! -d $(SHARED)/data/novels ] || [ ! -d $(SHARED)/models/gpt2-novels ]; then \
		echo "benchmarks-quick: skipped: $(SHARED) holds no data/novels and models/gpt2-novels."; \
		exit 0; \
	fi; \
	set -ex; \
	quick=$$(mktemp -d); trap 'rm -rf "$$quick"' EXIT; \
	$(BIN)/python -m benchmarks.quality $(QUICK) --only gpt2-novels --output "$$quick/quality.json"; \
	$(BIN)/python -m benchmarks.ablation $(QUICK) --output "$$quick/ablation.json"; \
	$(BIN)/python -m benchmarks.margins $(QUICK) --output "$$quick/margins.json"; \
	$(BIN)/python -m benchmarks.mixtures $(QUICK) --output "$$quick/mixtures.json"; \
	if [ -d $(SHARED)/data/nsl_kdd ]; then $(BIN)/python -m benchmarks.gru_svm --quick \
		--data $(SHARED)/data --work "$$quick/work" --output "$$quick/gru_svm.json"; fi; \
	$(BIN)/python -m benchmarks.gate_rates --quick --work "$$quick/rates" \
		--output "$$quick/gate_rates.json"

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
