# make app    environment, dependencies, then the page on http://127.0.0.1:7860 (PORT=7999 make app moves it)
# make test   environment, dependencies, then all tests
# make lock   the newest versions of all dependencies, with hashes, into requirements.lock
# REQUIREMENTS=requirements.lock after app or test: a new environment gets those very versions
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
HOST ?= 127.0.0.1
PORT ?= 7860

.PHONY: app test lock clean

app: $(VENV)/ready
	$(VENV)/bin/python app.py --host $(HOST) --port $(PORT)

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lock: $(VENV)/ready
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet uv
	$(VENV)/bin/python -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	    --custom-compile-command "make lock" requirements.txt --output-file requirements.lock

$(VENV)/ready: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MANet needs Python 3.11 or newer: make app PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

clean:
	rm -rf $(VENV)
