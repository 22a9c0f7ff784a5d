# `make demo` and `make test` need Linux or macOS, make and Python 3.11 or later, nothing else:
# they create .venv and install what constraints.txt pins. Paths stay relative, so that a
# checkout may lie in a folder with spaces in its name.

FITS := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(FITS)' 2>/dev/null && { echo "$$p"; break; }; done)

# The gpu wheel of onnxruntime runs on CPU too; it exists for this platform alone.
PLATFORM := $(shell uname -s)-$(shell uname -m)
RUNTIME := $(if $(filter Linux-x86_64,$(PLATFORM)),gpu,cpu)

VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := PYTHONWARNINGS=ignore $(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt
# Wheels whose files would overwrite those of the onnxruntime in use lie apart.
OTHERS := $(VENV)/providers
READY := $(VENV)/.ready-demo
READY_TEST := $(VENV)/.ready-test

.DELETE_ON_ERROR:
.PHONY: help demo paper docs test test-providers test-gpu test-versions dist clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | awk -F: '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: $(READY)  ## train with BatchNorm, fold, export to ONNX, verify (results in demo/)
	@$(VENV)/bin/python examples/digits.py --out demo

paper: $(READY)  ## the paper's claims on MNIST, three quarters of an hour (results in examples/)
	@$(VENV)/bin/python examples/paper/run_all.py

docs: $(READY_TEST)  ## build the documentation, notebooks run, links checked (in build/site/)
	@$(PIP) -e '.[docs]'
	cd examples/site && NO_MKDOCS_2_WARNING=1 ../../$(RUN) mkdocs build
	@echo "Open build/site/index.html"

test: $(READY_TEST)  ## format, lint, types, tests, wheel
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) pytest -n auto --maxprocesses 8 --dist loadgroup

test-providers: $(READY_TEST)  ## other providers than the CPU's, run for real
	@echo "Installing OpenVINO and ggml for onnxruntime into $(OTHERS) ..."
	@[ -d $(OTHERS)/openvino ] || $(PIP) --no-deps --target $(OTHERS)/openvino onnxruntime-openvino
	@[ -d $(OTHERS)/ggml ] || $(PIP) --no-deps --target $(OTHERS)/ggml onnxruntime-ggml
	PYTHONPATH="$(CURDIR)/$(OTHERS)/openvino" BNFX_REQUIRE_PROVIDERS=openvino \
		$(RUN) pytest -m providers tests/runtime -k openvino
	BNFX_GGML_LIBRARY="$(CURDIR)/$$(echo $(OTHERS)/ggml/onnxruntime_ggml/lib/*ggml.*)" \
		BNFX_REQUIRE_PROVIDERS=ggml $(RUN) pytest -m providers tests/runtime -k 'not openvino'

test-gpu: $(READY_TEST)  ## the tests that need a GPU; without one they fail
	BNFX_REQUIRE_GPU=1 $(RUN) pytest -m gpu

test-versions:  ## the core tests on other versions of Python, torch, onnx, onnxruntime (gigabytes)
	'$(PYTHON)' .ci/test_versions.py $(SETS)

dist: $(READY_TEST)  ## build the wheel and the source archive as they are published (in dist/)
	rm -rf dist
	$(RUN) build
	$(RUN) twine check --strict dist/*

clean:  ## remove what was built, keep .venv
	rm -rf build dist demo *.egg-info .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

$(VENV)/bin/pip:
	@'$(PYTHON)' -c '$(FITS)' || { \
		echo "bnfx needs Python 3.11 or later; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@'$(PYTHON)' -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing bnfx[$(RUNTIME)] into $(VENV); the first time takes some minutes ..."
	@$(PIP) -e '.[$(RUNTIME),examples]'
	@touch $@

# torchvision comes without its dependencies: it would replace a CPU torch by the CUDA one.
$(READY_TEST): $(READY)
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) -e '.[$(RUNTIME),test]'
	@$(PIP) --no-deps torchvision timm
	@$(PIP) huggingface_hub pillow PyYAML safetensors transformers
	@touch $@
