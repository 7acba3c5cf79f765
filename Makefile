# Each target sets up all it needs: a virtual environment in .venv, everything pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(NATIVE) $(wildcard tests/native/*.cpp tests/native/*.h tests/native/*.cu)

.PHONY: bench test gpu-check lint format readme compatibility docs clean

bench: $(VENV)/installed ## microbenchmarks; BENCH="--quick --html report.html" passes options
	$(PY) -m perfvl bench $(BENCH)

test: $(VENV)/installed ## the whole test suite; TEST="-k info_nce" passes options
	$(PY) -m pytest $(TEST)

# No environment of its own: the CUDA builds of torch and triton that this Python has are what is checked.
gpu-check: ## build, test, sanitize and benchmark on a GPU; GPU_CHECK="test bench" chooses stages
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

readme: $(VENV)/installed ## README's and docs/measured.md's tables from benchmarks/results/*.json
	$(PY) -m perfvl.benchmarks.tables --digest README.md benchmarks/results/*.json
	$(PY) -m perfvl.benchmarks.tables docs/measured.md benchmarks/results/*.json

compatibility: $(VENV)/installed ## the wheel beside other torches; COMPATIBILITY="--python python3.10 --torch 2.11.0"
	$(PY) tools/compatibility.py $(COMPATIBILITY)

docs: $(VENV)/installed ## the documentation pages, in build/docs
	$(PIP) mkdocs-material "mkdocstrings[python]"
	$(PY) -m mkdocs build --strict

$(VENV)/environment: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools ninja
# A CUDA build of torch has brought the triton it was made for; a CPU build brings none.
	test "$$(uname -s)" != Linux || $(PY) -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0
	$(PIP) --no-build-isolation --editable ".[bench,peers,models,examples,test,lint]"
	touch $@

$(VENV)/installed: $(VENV)/environment setup.py $(wildcard tools/*.py) $(NATIVE)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist *.egg-info perfvl/*.so perfvl/_build.json
