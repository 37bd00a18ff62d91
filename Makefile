# `make demo` and `make test` each set up what they need in .venv: Python 3.11+, pip, git and make are enough.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test torture lint setup help

PYTHON ?= python3
ARGS ?=
GPU ?=
WORKERS ?= 2
TORCH_INDEX ?=

gpu := $(filter-out 0 no false,$(GPU))
venv := $(if $(gpu),.venv-gpu,.venv)
core := $(venv)/.core-installed
dev := $(venv)/.dev-installed
unfinished := $(venv)/.unfinished
pip := $(venv)/bin/python -m pip
extras := dev,scale,sweep,track,dashboard,browser# A comma written in a call would end its argument.
# `===` compares the whole version string, so that a local CPU build (2.13.0+cpu) does not pass for the CUDA one.
torch := torch$(if $(gpu),===,==)$(shell sed -n 's/^torch==//p' constraints.txt)

# $(call install,pip's arguments): pip reports its own failures; an interruption leaves the `unfinished` file,
# and the next call starts from an empty environment.
define install
@touch $(unfinished)
	$(pip) install $(1) || { rm -f $(unfinished); exit 1; }
	@rm -f $(unfinished)
endef

help: ## Say what each command does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile
	@echo
	@echo '  ARGS="--seed 1"       more arguments for salt-vla demo, or for pytest'
	@echo '  PYTHON=python3.12     the Python that makes the environment (3.11 or newer)'
	@echo '  WORKERS=2             processes that run the tests'
	@echo '  GPU=1                 CUDA build of torch, in .venv-gpu; a demo finished on the CPU is not'
	@echo '                        run again, so add ARGS="--name demo_gpu"'
	@echo '  TORCH_INDEX=URL       where to take torch from, such as the index of CPU builds that'
	@echo '                        pytorch.org names under "Get started" (smaller by several GB)'

demo: $(core) ## Train teacher and student on the embedded films; write runs/demo/report.html
	$(venv)/bin/salt-vla demo $(ARGS)
demo: export SALT_VLA_ROOT ?= $(CURDIR)

test: lint ## Run the linters, the type checker, the import layers, then the tests
	OMP_NUM_THREADS=1 $(venv)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

tortured := $(addprefix tests/pipeline/test_cache_,kill.py kill_decoding.py faults.py repair.py)
tortured += tests/pipeline/test_detached.py tests/pipeline/test_queue_kill.py tests/pipeline/test_full_shape.py tests/pipeline/test_train_kill.py tests/unit/test_compiled.py
tortured += tests/pipeline/test_trackers.py

torture: $(dev) ## Kill builders and runs, damage caches, for some minutes; docs/reliability.md says what is looked for
	OMP_NUM_THREADS=1 $(venv)/bin/python -m pytest $(tortured) --torture -rP $(ARGS)

lint: $(dev) ## Run everything in `make test` that is not a test
	$(venv)/bin/ruff check
	$(venv)/bin/ruff format --check
	$(venv)/bin/mypy
	$(venv)/bin/lint-imports --no-logo

setup: $(dev) ## Make the environment, with the development tools

$(core): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'salt-vla needs Python 3.11 or newer; name one with: make PYTHON=python3.12' >&2; exit 1; }
ifneq ($(gpu),)
	@nvidia-smi >/dev/null 2>&1 || { \
	    echo 'GPU=1 needs an NVIDIA driver, and nvidia-smi does not answer; without GPU=1 the CPU is used' >&2; exit 1; }
endif
	@if [ -e $(unfinished) ] || ! $(pip) --version >/dev/null 2>&1; then \
	    rm -rf $(venv) && mkdir $(venv) && touch $(unfinished) && $(PYTHON) -m venv $(venv) || { \
	    echo 'could not make $(venv); on Debian and Ubuntu the package python3-venv is needed' >&2; exit 1; }; fi
	$(call install,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(torch)')
	$(call install,-c constraints.txt -e .)
ifneq ($(gpu),)
	@$(venv)/bin/python -c 'import torch; torch.cuda.init()' || { \
	    echo 'torch finds no GPU that it can use (above); without GPU=1 the CPU is used' >&2; exit 1; }
endif
	@touch $@

$(dev): $(core)
	$(call install,-c constraints.txt -e '.[$(extras)]')
	@touch $@
