# Every command runs in .venv, which is made from pyproject.toml and made again when that file changes.

PYTHON ?= python3

# torch is installed first, by exact version. Left to find torch as a dependency, pip takes the newest one, on Linux
# often an accelerator build of several gigabytes; installed first, it is the build you chose. Anything pip accepts
# will do (a version, a wheel, options); run `make clean` before you change it. For example, a CPU wheel you have:
#   make test TORCH='torch==2.13.0 --find-links path/to/wheels'
TORCH ?= torch==2.13.0

# Bytecode is written where a module is first imported, even where the environment says not to: pip installs none here
# (--no-compile, as most is never imported), and each process would compile the sources of torch again, for seconds.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
ifndef TOGETHER
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:
.PHONY: help demo test lint format types docs serve-docs wheel doctests unit bench results clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.examples ## grow a tree and draw sharp images of its clusters; then classify, forget, and compare; see demo/
	$(BIN)/python examples/train_treevae.py --effort 0.5 --out demo
	$(BIN)/python examples/train_diffusion.py --tree demo/model.safetensors --epochs 40 --batch-size 256 \
		--out demo/refined
	$(BIN)/python examples/generate.py --model demo/refined/model.safetensors --out demo/refined
	$(BIN)/python examples/train_munkey.py --epochs 30 --out demo/munkey
	$(BIN)/python examples/train_munkey.py --epochs 30 --leave-out 100 --out demo/without
	$(BIN)/python examples/forget.py --model demo/munkey/model.safetensors --file demo/without/left_out.txt \
		--beside demo/without/model.safetensors --out demo/forgotten

# Two at a time: the documentation takes one core for minutes, in which the other one does the rest.
test: $(VENV)/.test ## every check, from lint to unit
	$(MAKE) --no-print-directory --jobs=2 TOGETHER=1 lint types docs wheel doctests unit

lint: $(VENV)/.test ## style, with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test ## fix the style where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test ## annotations, with mypy
	$(BIN)/mypy

# Not --quiet: that hides the warnings from --strict as well. One thread, as the models of the tutorials are tiny.
docs: $(VENV)/.test ## run the tutorials and build the documentation into site/; a warning is an error
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve-docs: $(VENV)/.test ## show the documentation in a browser while you write it
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The wheel is built from the source archive, unpacked into a folder of its own, compared with the checkout file by
# file, and imported from there. Its dependencies come from .venv, so their list is not checked here but by
# tests/test_project.py, which reads the imports.
wheel: $(VENV)/.test ## build the package and import it from its wheel
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target build/wheel dist/*.whl
	for package in treediff munkey; do diff -r -x __pycache__ $$package build/wheel/$$package || exit 1; done
	cd / && PYTHONPATH="$(CURDIR)/build/wheel" "$(CURDIR)/$(BIN)/python" -P -W error -c \
		'import sys, munkey, treediff; files = munkey.__file__, treediff.__file__; \
		print("imported", treediff.__version__, "from the wheel") if all(file.startswith(sys.argv[1]) for file in files) \
		else sys.exit("not from the wheel: " + repr(files))' "$(CURDIR)/build/wheel/"

doctests: $(VENV)/.test ## run the examples in the docstrings
	$(BIN)/python -m pytest --quiet --doctest-modules treediff munkey

# A process for each core, each with one thread of its own, and files as a whole: what a file makes once is made once.
# In their order, which has many small ones at the end: else files with few tests, which take longest, come last.
unit: $(VENV)/.test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.test ## time everything beside its peers and the last record; see build/bench/speed.md
	$(BIN)/python benchmarks/record.py

ROWS ?=
results: $(VENV)/.test ## make the recorded results again, many hours; resumes an interrupted run; see benchmarks/results.mk
	$(MAKE) -f benchmarks/results.mk PYTHON=$(BIN)/python $(if $(ROWS),ROWS='$(ROWS)')

clean: ## remove everything the commands above made
	rm -rf $(VENV) build demo dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find treediff munkey tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is " \
		+ sys.version.split()[0] + ". Name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	touch $@

$(VENV)/.examples: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[examples]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test,docs]'
	touch $@
