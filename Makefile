# make demo    train the smoke recipe through VILA's three stages on this machine
# make test    the tests          make check   lint, format, types, floors
# make test-extras                tests of what torchao, Liger, lm-eval, lmms-eval and W&B add, which get an environment of their own
# make bench   the benchmarks     make real    the three stages with small real weights
# make bench-data                 data loading beside other libraries, which get an environment of their own
# make bench-control              checkpoints, the journal, control's part of a step, a simulated week of failures
# make bench-ops                  a served model under 200 questions, the first step, the report of a long run, metrics
# make faults                     a run through every fault, in each of its stages: the better part of an hour
# make docs    these pages as a site, in .cache/site, by mkdocs, which gets an environment of its own
# make bench-train                training steps and memory beside bare torch, accelerate and transformers' Trainer

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
COMPETITORS := benchmarks/.cache/venv-competitors
EXTRAS := .cache/venv-extras
DOCS := .cache/venv-docs
PLACE := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: demo test docs test-extras check faults bench bench-data bench-train bench-control bench-ops real format clean

demo: $(VENV)/.installed
	$(BIN)/mllm train vila_smoke --workers $(WORKERS)

# What needs no machine for itself (tests/conftest.py marks what does) is shared by two processes of one thread each.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone

faults: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults

# Triton's interpreter runs Liger's kernel without a GPU.
test-extras: $(EXTRAS)/.installed
	TRITON_INTERPRET=1 $(EXTRAS)/bin/python -m pytest tests/cluster/test_extras.py tests/ops/test_liger.py tests/mllm/test_harness.py tests/mllm/test_lmms.py tests/cluster/test_wandb.py

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo .cache/site/index.html

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

bench-data: $(VENV)/.installed-dev $(COMPETITORS)/.installed
	$(BIN)/python -m benchmarks data $(if $(QUICK),--quick)

bench-control: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks checkpoint control $(if $(QUICK),--quick)

bench-ops: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks ops $(if $(QUICK),--quick)

bench-train: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks train $(if $(QUICK),--quick)

real: $(VENV)/.installed-real
	$(BIN)/python examples/real/prepare.py .cache/weights
	$(BIN)/mllm train vila_real --workers $(WORKERS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .cache

# torch goes first, pinned: asked for through another package, the newest one would come with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	touch $@

# torch first here too; the rest is pinned whole, because some of it asks for what does not fit (the file says what).
$(COMPETITORS)/.installed: benchmarks/data/requirements.txt constraints.txt
	test -x $(COMPETITORS)/bin/python || $(PYTHON) -m venv $(COMPETITORS)
	$(COMPETITORS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(COMPETITORS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/data/requirements.txt
	touch $@

# Our own environment and some packages on top, which it need not know of. lmms-eval asks for torchvision, timm and what its tasks
# score with, and can do without where tasks are of a person's own.
$(EXTRAS)/.installed: $(VENV)/.installed-dev constraints.txt
	test -x $(EXTRAS)/bin/python || $(BIN)/python -m venv $(EXTRAS)
	$(BIN)/python -c '$(PLACE)' > $$($(EXTRAS)/bin/python -c '$(PLACE)')/base.pth
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torchao liger-kernel triton
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt lm-eval loguru tenacity wandb
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt lmms-eval "filelock<4"
	touch $@

# Pages are text: their builder needs nothing of this project.
$(DOCS)/.installed: constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material
	touch $@
