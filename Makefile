# Two commands: `make tour` watches a model learn, `make test` checks everything.
# Each sets up .venv on its first run; all that is needed is make and Python 3.11 or newer under any name.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
READY = .venv/.ready
FLOOR = .venv-floor/.ready
WORKERS ?= 2
# one thread a process where several run at once: two processes with two threads each on two cores wait for each other
ALONE = OMP_NUM_THREADS=1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

TPU = .venv-tpu/.ready
.PHONY: help tour test test-floor test-tpu lab notebooks export clean

help:
	@echo 'make tour        train the miniature systems on this machine, answer questions, write runs/tour/report.html'
	@echo 'make test        tests, every notebook, library-in-sync check and notebook lint (WORKERS=2)'
	@echo 'make lab         open the book in JupyterLab'
	@echo 'make test-floor  the same tests with the oldest supported versions, in .venv-floor'
	@echo 'make test-tpu    the XLA lane on virtual devices of the processor, in .venv-tpu (a download of 3 GB)'
	@echo 'make notebooks   run notebooks and store their outputs (NB="nbs/1_see/2_patches.ipynb ...", default: all)'
	@echo 'make export      write the library, the stubs of the exercises and the tables of the book from the notebooks'

tour: $(READY)
	@.venv/bin/mllm tour

test: $(READY)
	@$(ALONE) .venv/bin/python -m pytest -n $(WORKERS) $(TESTS)

test-floor: $(FLOOR)
	@$(ALONE) MLLM_NB_FLOOR=1 .venv-floor/bin/python -m pytest -n $(WORKERS) $(TESTS)

test-tpu: $(TPU)
	@$(ALONE) .venv-tpu/bin/python -m pytest -s tests/tpu

lab: $(READY)
	@.venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

notebooks: $(READY)
	@$(ALONE) .venv/bin/python tests/run_notebooks.py $(NB)

export: $(READY)
	@.venv/bin/python -m mllm_nb.exercises
	@.venv/bin/nbdev_export
	@.venv/bin/python tests/book_table.py

clean:
	rm -rf .venv .venv-floor .venv-tpu build dist runs *.egg-info

# one install; the stamp is older than settings.ini or constraints.txt only when they changed
define install
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer with venv was not found (python3, python3.11 ... python3.14); name it: make PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Setting up $(1) with $(PYTHON), once; downloading PyTorch can take a few minutes ...'
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq $(2) -e '.[dev]'
	@touch $(1)/.ready
endef

$(READY): settings.ini constraints.txt setup.py pyproject.toml
	$(call install,.venv,-c constraints.txt)

$(FLOOR): settings.ini tests/floor.txt setup.py pyproject.toml
	$(call install,.venv-floor,-c tests/floor.txt)

$(TPU): settings.ini setup.py pyproject.toml
	@echo 'Setting up .venv-tpu: PyTorch/XLA needs exactly PyTorch 2.9 ...'
	@$(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install -qq -e '.[tpu]' pytest pytest-xdist hypothesis
	@touch $(TPU)
