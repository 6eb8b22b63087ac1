# What a person types. Everything lives in .venv; nothing is installed elsewhere.
#
#   make mnist    train a CNN of our operators on handwritten digits, beside its torch.nn twin
#   make filters  shows what a filter does to a digit
#   make test     the whole test suite
#   make sanitize the CUDA kernels, emulated on the CPU, under sanitizers: see tests/cuda_on_cpu/README.md
#   make models   converts every classifier of torchvision, compares it with torch's, and writes docs/models.md
#   make bench    how fast, beside torch; ARGS="--help" lists the options
#   make gpu-check  all there is to know on a GPU, in ten minutes: tests, compute-sanitizer, times beside torch's
#   make check    formatting and lints, as CI runs them
#
# PYTHON picks the interpreter (3.10 or later), CNNOPS_CUDA=0/1 and TORCH_CUDA_ARCH_LIST what is built: see setup.py.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: mnist filters test sanitize models bench gpu-check build check format clean

mnist: build
	$(RUN) examples/mnist.py $(ARGS)

filters: build
	$(RUN) examples/filters.py

test: build
	$(RUN) -m pytest -n 2 $(ARGS)

sanitize: build
	for sanitizer in address thread; do \
		CNNOPS_EMULATE_SANITIZE=$$sanitizer $(RUN) -m pytest -n 2 tests/test_cuda_*.py tests/test_emulation.py $(ARGS) || exit 1; \
	done

models: build
	$(RUN) tests/torchvision_models.py $(ARGS)

bench: build
	$(RUN) -m cnnops bench $(ARGS)

gpu-check: build
	$(RUN) -m benchmarks.gpu_check --save runs/gpu-check $(ARGS)

# Which kind was built last is part of the stamp's name, so that another CNNOPS_CUDA builds again.
BUILT := $(VENV)/built$(CNNOPS_CUDA)
build: $(BUILT)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements.txt 'setuptools>=77' wheel ninja pybind11 numpy
	touch $@

# The extras come with the package itself; torch is there already and stays as it is.
$(BUILT): $(VENV)/installed $(SOURCES)
	$(RUN) setup.py -q install_nvcc
	$(PIP) install --no-build-isolation -v -e '.[examples,dev]' > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@grep '^ *cnnops: built' $(VENV)/build.log
	@rm -f $(VENV)/built*; touch $@

check: build
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: build
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info cnnops/*.so cnnops/_build.py $(VENV)/built*
