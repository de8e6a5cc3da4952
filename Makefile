# make demo   the whole chain on a generated sample, ending with its report
# make test   lint and tests

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := EUROSAT_PROFILE=demo EUROSAT_DATASET_ROOT=sample EUROSAT_PROJECT_ROOT=

.PHONY: install demo test

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: install
	$(RUN) download_weights.py
	$(RUN) make_sample.py
	$(DEMO) $(RUN) split_data.py
	$(DEMO) $(RUN) verify_splits.py
	$(DEMO) $(RUN) train_rgb.py
	$(DEMO) $(RUN) train_ms.py
	$(DEMO) $(RUN) predict_test.py
	$(DEMO) $(RUN) reproduce.py
	$(DEMO) $(RUN) rank_images.py
	$(DEMO) $(RUN) make_report.py

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -n 2
