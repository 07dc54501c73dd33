# make lab opens the course, make test runs every test; both build .venv first when it is missing or out of date.
# In a container: make lab LAB_OPTIONS="--allow-root --no-browser --ip=0.0.0.0"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

.PHONY: lab test test-fast notebooks readme site pages pictures badges papers claims student grade lint clean

lab: $(VENV)/ready
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_OPTIONS)

# Several processes with one thread each get through more tests than one process with several threads.
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)

test: $(VENV)/ready
	$(SIDE_BY_SIDE) --dist worksteal tests -m "not browser"
	$(PYTEST) tests -m browser
	MEDSEG_SCALE=cpu $(SIDE_BY_SIDE) --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider $(NOTEBOOKS)

test-fast: $(VENV)/ready
	$(SIDE_BY_SIDE) --dist worksteal tests -m "not slow and not browser and not real"

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)
	$(BIN)/python notebooks/readme.py $(NOTEBOOKS)

# make readme: the minutes in class in the notebooks' headers, and the README's table of notebooks.
readme: $(VENV)/ready
	$(BIN)/python notebooks/readme.py $(NOTEBOOKS)

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

# make claims: CLAIMS.md and its paragraph in the README, from data/results/claims.csv.
claims: $(VENV)/ready
	$(BIN)/python notebooks/claims.py

# make student OUT=folder: the notebooks without solutions. REPO=owner/name BRANCH=student: where the folder will be published.
student: $(VENV)/ready
	$(BIN)/python notebooks/student.py $(or $(OUT),build/student) $(if $(REPO),--repository $(REPO)) $(if $(BRANCH),--branch $(BRANCH))

# make grade SUBMISSIONS=folder: exercises of students' notebooks against the checks, into OUT=grades.csv. SEED=n repeats a run.
grade: $(VENV)/ready
	$(BIN)/python notebooks/grade.py $(SUBMISSIONS) $(if $(SEED),--seed $(SEED)) $(if $(OUT),--out $(OUT)) $(GRADE_OPTIONS)

lint: $(VENV)/ready
	$(BIN)/ruff check medseg_lite tests benchmarks experiments notebooks
	$(BIN)/ruff format --check medseg_lite tests benchmarks experiments notebooks

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	touch $@
