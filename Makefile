# make demo   trains, samples and scores on the built-in pictures (CPU or GPU), into runs/quickstart
# make test   runs the test suite
# make lint   checks style
# Each makes its environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test test-slow lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	accelerate launch train/tokenizer.py --config configs/quickstart/tokenizer.yaml --resume true
	vistok cache --tokenizer $(RUN)/tokenizer --data Emoji --data.split train --output $(RUN)/tokens
	accelerate launch train/generator.py --config configs/quickstart/generator.yaml --resume true
	vistok reconstruct --tokenizer $(RUN)/tokenizer --output $(RUN)/reconstructions.png
	vistok generate --checkpoint $(RUN) --output $(RUN)/samples
	vistok evaluate --config configs/quickstart/rfid.yaml
	vistok evaluate --config configs/quickstart/fid.yaml --untrained true --name untrained
	vistok evaluate --config configs/quickstart/fid.yaml --name trained
	vistok scores --results $(RUN)/metrics.json
	@echo "Pictures: $(RUN)/reconstructions.png $(RUN)/samples.png; scores: $(RUN)/metrics.json"

test: $(VENV)/installed
	python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/installed
	python -m pytest -n 2 -m slow

lint: $(VENV)/installed
	ruff check .
	ruff format --check .

clean:
	rm -rf $(VENV) $(RUN)
