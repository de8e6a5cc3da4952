# make demo   the whole chain on the real images in sample/, ending with its report
# make test   lint and tests
# make submission   one zip of what is handed in
# The studies need the packages in requirements-more.txt: make more

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: install more demo test submission

install: $(VENV)/installed
more: $(VENV)/more

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/more: $(VENV)/installed requirements-more.txt
	$(RUN) -m pip install --quiet --requirement requirements-more.txt
	touch $@

demo: export EUROSAT_PROFILE := demo
demo: export EUROSAT_DATASET_ROOT := $(CURDIR)/sample
demo: export EUROSAT_PROJECT_ROOT :=
demo: install
	$(RUN) split_data.py
	$(RUN) verify_splits.py
	$(RUN) train_rgb.py
	$(RUN) train_ms.py
	$(RUN) predict_test.py
	$(RUN) reproduce.py
	$(RUN) rank_images.py
	$(RUN) make_report.py

test: $(VENV)/more
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -n 2 --dist worksteal

submission: install
	$(RUN) -m studies.submission
