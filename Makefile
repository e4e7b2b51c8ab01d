# Each target makes the virtual environment, installs what it needs the first time and runs.
# Needs python3 (3.10 or newer), pip and make.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

CONSTRAINTS := .ci/constraints.txt
IN_VENV := $(VENV)/bin/python

.DEFAULT_GOAL := help

ifeq ($(wildcard $(CONSTRAINTS)),)
# Called from another folder, as make -f DIR/Makefile: the paths below are relative to DIR.
HERE := $(shell dirname "$(strip $(MAKEFILE_LIST))")
help: ; @$(MAKE) --no-print-directory -C "$(HERE)" help
%: ; @$(MAKE) --no-print-directory -C "$(HERE)" $@
else

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow test-gpu test-oldest test-newest lint docs dist bench bench-gpu benchmarks clean

help:
	@echo 'make demo       overlap of the largest weights and the Hessian eigenspace, on digits: half a minute'
	@echo 'make test       the tests that take seconds'
	@echo 'make test-slow  the tests marked slow'
	@echo 'make test-gpu   the tests marked gpu, which a CUDA device has to be there for'
	@echo 'make test-oldest, make test-newest   the same with the oldest versions allowed, and the newest'
	@echo 'make lint       ruff and mypy'
	@echo 'make docs       the documentation site, its pages executed and checked, into build/docs'
	@echo 'make dist       sdist and wheel in dist/'
	@echo 'make bench      products, eigensolves, spectra beside other libraries; memory, storage, scaling, pruning, optimizers, PINNs'
	@echo 'make bench-gpu  on a CUDA device: products, 1000 eigenpairs of 3c3d and ResNet-18, overhead in training'
	@echo 'make clean      remove the virtual environments, caches and build outputs'
	@echo
	@echo 'ARGS="..." is handed on to the command:  make demo ARGS=--full, which adds the exact Hessian'
	@echo 'PRUNING="--data DIR --checkpoints DIR": for the benchmarks of pruning, which need both.'
	@echo 'PYTHON=...  picks the interpreter, VENV=... the folder of the virtual environment.'

demo: $(VENV)/.has-examples
	@$(IN_VENV) examples/overlap.py $(ARGS)

# A process for each core, of one thread each, four at most: small tensors gain nothing from threads.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.has-test
	@$(IN_VENV) -m pytest -q $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.has-test
	@$(IN_VENV) -m pytest -q -m slow $(PARALLEL) $(ARGS)

# In one process: the tests share the device.
test-gpu: $(VENV)/.has-test
	@$(IN_VENV) -m pytest -q -m gpu $(ARGS)

# In environments of their own, with PYTHON=... for another interpreter. torch's own builds for Linux,
# which both take, bring several GB of CUDA packages.
test-oldest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest CONSTRAINTS=.ci/oldest.txt test

test-newest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-newest CONSTRAINTS=.ci/newest.txt test

lint: $(VENV)/.has-dev
	@$(IN_VENV) -m ruff check --quiet .
	@$(IN_VENV) -m ruff format --quiet --check . || \
	    { echo 'Not formatted. Run: $(IN_VENV) -m ruff format .'; exit 1; }
	@$(IN_VENV) -m mypy hesscurv integrations

# Any warning fails: a block of code with an error, a broken link, a missing reference. Pages run on one
# thread: their nets are small.
docs: export OMP_NUM_THREADS ?= 1
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.has-docs $(VENV)/.curvlinops
	@$(IN_VENV) examples/guide/site_checks.py sources
	@$(IN_VENV) -m mkdocs build --clean --strict -f examples/guide/mkdocs.yml $(ARGS)
	@$(IN_VENV) examples/guide/site_checks.py site
	@echo 'Open build/docs/index.html'

# The sdist is built first, and the wheel from it: both hold the same.
dist: $(VENV)/.has-dev
	@rm -rf build dist hesscurv.egg-info
	@$(IN_VENV) -m build --outdir dist .
	@ls -l dist

# In an environment of its own: a library that is compared with brings a torchvision along, which need
# not fit this torch, and then Lightning and Transformers, which the tests import, fail on it.
bench:
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench benchmarks

benchmarks: $(VENV)/.has-bench
	@$(IN_VENV) examples/benchmarks/products.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/eigensolvers.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/sample_space.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/spectra.py $(filter --quick,$(ARGS))
	@$(IN_VENV) examples/benchmarks/memory.py $(filter --quick,$(ARGS))
	@$(IN_VENV) examples/benchmarks/storage.py $(filter --quick,$(ARGS))
	@$(IN_VENV) examples/benchmarks/scaling.py $(filter --quick,$(ARGS))
	@$(IN_VENV) examples/benchmarks/pruning.py $(or $(PRUNING),--quick)
	@$(IN_VENV) examples/benchmarks/structured.py $(or $(PRUNING),--quick)
	@$(IN_VENV) examples/benchmarks/equal_time.py $(or $(PRUNING),--quick)
	@$(IN_VENV) examples/benchmarks/pruning_memory.py $(filter --quick,$(ARGS))
	@$(IN_VENV) examples/benchmarks/optimizers.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/deep_nets.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/monitor.py $(ARGS)
	@$(IN_VENV) examples/benchmarks/prune_when_stable.py $(or $(filter --quick,$(ARGS)),$(if $(findstring --data,$(ARGS)),$(ARGS),--quick))
	@$(IN_VENV) examples/benchmarks/pinns.py $(ARGS)

# In the same environment; with CONSTRAINTS=... for a torch that fits the GPU. What it measures where
# there is none: make bench-gpu ARGS="--small --device cpu"
bench-gpu:
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench gpu-figures

gpu-figures: $(VENV)/.has-bench
	@$(IN_VENV) examples/benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-oldest $(VENV)-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find hesscurv integrations tests examples -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each extra, so that a target installs what it needs and no more, and a second call
# installs nothing. pip speaks up only when it fails.
$(VENV)/.has-%: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	@echo "Installing hesscurv[$*] into $(VENV) (minutes, the first time)"
	@$(IN_VENV) -m pip install -qq --disable-pip-version-check \
	    -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

# curvlinops alone: what it names as needed brings a torchvision, and with it another torch, for one of
# its examples.
$(VENV)/.curvlinops: $(VENV)/.has-docs
	@$(IN_VENV) -m pip install -qq --disable-pip-version-check --no-deps -c $(CONSTRAINTS) \
	    curvlinops-for-pytorch backpack-for-pytorch einconv unfoldNd einops linear_operator opt_einsum
	@touch $@

# Some systems ship Python without ensurepip: there the pip at hand installs the environment's own.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'hesscurv needs Python 3.10 or newer; "$(PYTHON)" is missing or older.'; \
	      echo 'Name another: make PYTHON=python3.12 ...'; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@if $(IN_VENV) -m pip --version > /dev/null 2>&1; then :; \
	elif $(PYTHON) -c 'import ensurepip' 2> /dev/null; then $(PYTHON) -m venv $(VENV); \
	else \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(IN_VENV) install -qq --disable-pip-version-check pip; \
	fi || { echo 'Could not make a virtual environment with "$(PYTHON)": it lacks ensurepip, and'; \
	        echo 'its pip is missing or older than 22.3. On Debian and Ubuntu,'; \
	        echo '"apt-get install python3-venv" brings what is needed.'; exit 1; }
	@touch $@

endif
