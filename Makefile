# Everything runs in .venv; `make serve` and `make test` set it up on their own.
#
#   PYTHON       interpreter for .venv, 3.11 or newer
#   TORCH_INDEX  URL of a wheel index for torch. Empty: pip's own settings. On a machine without GPU, give the index of
#                CPU builds named on PyTorch's install page: the default Linux wheel brings gigabytes of CUDA libraries along
#   PORT         port of `make serve`
#   SERVE_ARGS   further options of medusa-server, e.g. SERVE_ARGS="--model ~/models/vicuna-7b --heads ~/models/heads"

PYTHON ?= python3
TORCH_INDEX ?=
PORT ?= 8000
SERVE_ARGS ?=

TORCH := torch==2.13.0
BIN := .venv/bin
# A torch that the interpreter already has (a GPU image's, say) is used as it is, if it is a version that we support.
HAS_TORCH := -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); raise SystemExit(not (2, 11) <= v < (2, 14))'

# Packages of others that talk to a server, whose dependencies do not go with the project's or with each other's.
CLIENTS := build/clients
# The same for what runs several servers as one.
SCALE := build/scale

.PHONY: install serve test test-all clients scale check lock audit clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi
	$(BIN)/python $(HAS_TORCH) 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)")
	$(BIN)/python -m pip install -e ".[demo,dev]"
	touch $@

serve: install
	$(BIN)/medusa-server --port $(PORT) $(SERVE_ARGS)

# Tests that only compute run side by side, one for each core; those that start servers or measure come one after the other.
COMPUTING := $(addprefix tests/,attention cache equivalence grammar kernels model runtime sampling scheduler speculation text \
  training tree)

define run-tests
$(BIN)/python -m pytest -m "$(1)" -n auto --maxprocesses 8 $(COMPUTING)
$(BIN)/python -m pytest -m "$(1)" $(addprefix --ignore=,$(COMPUTING))
endef

test: install
	$(call run-tests,not long and not cuda)

test-all: test clients scale
	$(call run-tests,long and not cuda)
	$(BIN)/python -m pytest -m cuda

clients: $(CLIENTS)/python/.installed $(CLIENTS)/lm-eval/.installed $(CLIENTS)/node/.installed

$(CLIENTS)/%/.installed: tests/e2e/clients/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-compile -r $<
	touch $@

$(CLIENTS)/node/.installed: tests/e2e/clients/package.json
	mkdir -p $(@D)
	cp $< $(@D)
	if command -v npm; then cd $(@D) && npm install --no-package-lock && touch .installed; \
	else echo "npm is not installed: the test of OpenAI's client for Node will be skipped"; fi

scale: $(SCALE)/router/.installed $(SCALE)/ray/.installed

$(SCALE)/router/.installed: tests/scale/router.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-compile -r $<
	touch $@

# Ray loads the server into its own processes, so this one sees the project's packages too; pip adds what they lack.
$(SCALE)/ray/.installed: tests/scale/ray.txt .venv/.installed
	$(BIN)/python -m venv --system-site-packages $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(@D)/bin/python -m pip install --no-compile -r $<
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the images are made of. LOCK_ARGS=--upgrade takes the newest versions that pyproject.toml admits.
lock: install
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python deploy/locks/lock.py $(LOCK_ARGS)

audit: install
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python deploy/locks/audit.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
