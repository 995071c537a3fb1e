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
	python sample/reconstruct.py --tokenizer $(RUN)/tokenizer --output $(RUN)/reconstructions.png
	python sample/generate.py --checkpoint $(RUN) --output $(RUN)/samples
	python sample/evaluate.py --config configs/quickstart/rfid.yaml
	python sample/evaluate.py --config configs/quickstart/fid.yaml --untrained true --name untrained
	python sample/evaluate.py --config configs/quickstart/fid.yaml --name trained
	vistok scores --file $(RUN)/metrics.json
	@echo "Pictures: $(RUN)/reconstructions.png $(RUN)/samples.png; scores: $(RUN)/metrics.json"

test: $(VENV)/installed
	python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/installed
	python -m pytest -m slow

lint: $(VENV)/installed
	ruff check .
	ruff format --check .

clean:
	rm -rf $(VENV) $(RUN)
