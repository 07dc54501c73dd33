# make lab opens the course, make test runs every test; both build .venv first when it is missing or out of date.
# In a container: make lab LAB_OPTIONS="--allow-root --no-browser --ip=0.0.0.0"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

.PHONY: lab test test-fast notebooks readme site pages pictures badges papers lint clean

lab: $(VENV)/ready
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_OPTIONS)

test: $(VENV)/ready
	$(BIN)/python -m pytest tests
	MEDSEG_SCALE=cpu $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider $(NOTEBOOKS)

test-fast: $(VENV)/ready
	$(BIN)/python -m pytest tests -m "not slow and not browser and not real"

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)
	$(BIN)/python notebooks/readme.py

# make readme: the README's table of notebooks, with their minutes.
readme: $(VENV)/ready
	$(BIN)/python notebooks/readme.py

# make site: the course as web pages in build/site, with the live widgets. make pages: the notebooks alone, in seconds.
site: $(VENV)/ready
	$(BIN)/python notebooks/pages.py --live build/site

pages: $(VENV)/ready
	$(BIN)/python notebooks/pages.py build/site

# make pictures: the pictures of the README, from a phantom, shipped networks and the live widgets; needs a Chromium.
pictures: site
	$(BIN)/python notebooks/pictures.py --live build/site/live

# make badges REPO=owner/name: notebooks and README point at that repository.
badges: $(VENV)/ready
	$(BIN)/python notebooks/badges.py $(REPO)

# make papers: the tables of PAPERS.md, from the docstrings' Source lines.
papers: $(VENV)/ready
	$(BIN)/python notebooks/papers.py

lint: $(VENV)/ready
	$(BIN)/ruff check medseg_lite tests benchmarks experiments notebooks
	$(BIN)/ruff format --check medseg_lite tests benchmarks experiments notebooks

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	touch $@
