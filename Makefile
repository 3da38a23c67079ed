# `make` lists the targets. All but `gpu` work in an environment of their own, .venv; PYTHON makes it.
PYTHON ?= python3
# What throughput.py is told, for example: make bench BENCH="--steps 4 8 --neurons 4194304"
BENCH ?= --quick
# On a GPU the compiled plain loop alone would take longer to compile than all the rest to measure.
GPU_BENCH ?= --steps 4 8 16 32 --neurons 4194304 --dtypes float32 bfloat16 --repeat 10 --competitors \
	fastsnn-triton fastsnn-triton-statistics fastsnn-cuda fastsnn-cuda-statistics loop spikingjelly spikingjelly-compiled snntorch
# Tests that need packages which a machine with a GPU may lack.
GPU_IGNORED = $(addprefix tests/,test_peers.py test_attack_peers.py test_apgd.py test_black_box.py test_install.py test_cli.py test_checkpoints.py \
	test_training.py test_commands.py test_attack_command.py test_demo.py test_report.py test_pictures.py test_landscapes.py test_membranes.py \
	test_bad_data.py test_data.py test_approximations.py test_evaluation.py test_checks.py test_transfer.py test_activity.py test_corruptions.py \
	test_bench_attacks.py test_bench_throughput.py test_bench_robustness.py test_bench_conversion.py test_conversion.py test_convert_command.py test_at_family.py test_objectives.py test_paper_neurons.py \
	test_hire_dlif.py test_defenses_command.py emulation)
RESULTS = $(or $(OUT),bench/results)

VENV = .venv/bin/python
PIP = $(VENV) -m pip --disable-pip-version-check
# Finds a cmake that pip brought, where the machine has none.
WITH_CMAKE = PATH="$(CURDIR)/.venv/bin:$$PATH"
BUILD = CMAKE_ARGS=-DFASTSNN_CUDA=OFF $(WITH_CMAKE)
PYTEST = FASTSNN_REQUIRE_KERNELS=1 $(VENV) -m pytest -n 2 --dist worksteal --durations=15
SOURCES = $(wildcard setup.py CMakeLists.txt cmake/* kernels/*.cpp kernels/*.h kernels/*.def)

# What the demonstration is told, for example: make demo DEMO="--out runs/other --seeds 1"
DEMO ?= --out runs/demo

# What the comparison of defenses is told, for example: make bench-robustness ROBUSTNESS=--quick
ROBUSTNESS ?= --out runs/robustness
# The same of robust conversion.
CONVERSION ?= --out runs/conversion

.DEFAULT_GOAL = help
.PHONY: help info test demo thorough bench bench-all bench-training bench-attacks bench-robustness bench-conversion static compile-cases sanitize mutations gpu wheel clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# pip keeps to constraints.txt: it names versions of every package that comes along.
.venv/.packages: pyproject.toml constraints.txt requirements-peers.txt
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt setuptools wheel $$(command -v cmake >/dev/null || echo cmake ninja)
	$(BUILD) $(PIP) install -q -c constraints.txt --no-build-isolation --editable '.[test,bench]'
	$(PIP) install -q --no-deps -r requirements-peers.txt
	touch $@

# The tests run the CUDA sources without nvcc; a machine with a GPU has `make gpu`.
build/cmake/.built: .venv/.packages $(SOURCES)
	$(BUILD) $(VENV) setup.py -q build_ext --inplace
	@test -e build/cmake/lib/_fastsnn_cpu.so || { echo "make: the CPU kernels were not built; the reason is above."; exit 1; }
	touch $@

info: build/cmake/.built ## what runs here, and why the rest does not
	@$(VENV) -m fastsnn info

test: build/cmake/.built ## every test, kernels required (a few minutes on two cores)
	$(PYTEST)

demo: build/cmake/.built ## train, attack and compare a plain and a robust network on digits (3 minutes on two cores)
	$(VENV) -m fastsnn demo $(DEMO)

thorough: build/cmake/.built ## the same with new and many more cases, and the large ones (hours, 16 GB)
	$(PYTEST) --hypothesis-profile=thorough

bench: build/cmake/.built ## the speed table against the peers, quick (90 s on two cores); options in BENCH
	@mkdir -p $(RESULTS)
	$(VENV) bench/throughput.py $(BENCH) --json $(RESULTS)/quick.json

bench-all: build/cmake/.built ## the same over every size, number of steps and dtype, with a plot
	@mkdir -p $(RESULTS)
	$(VENV) bench/throughput.py --json $(RESULTS)/throughput.json --plot $(RESULTS)/throughput.png

bench-training: build/cmake/.built ## a training step of VGG11 with the neurons of fastsnn and of the peers (minutes)
	@mkdir -p $(RESULTS)
	$(VENV) bench/training_step.py --json $(RESULTS)/training-step.json

bench-attacks: build/cmake/.built ## seconds of each suite of attacks, and what the ensemble saves by sharing (minutes)
	@mkdir -p $(RESULTS)
	$(VENV) bench/attacks.py --json $(RESULTS)/attacks.json

bench-robustness: build/cmake/.built ## every defense under one budget, attacked and ranked; ROBUSTNESS="--data fashion-mnist.npz --epochs 6" (hours)
	@mkdir -p $(RESULTS)
	$(VENV) bench/robustness.py $(ROBUSTNESS) --json $(RESULTS)/robustness.json --plot $(RESULTS)/robustness.png

bench-conversion: build/cmake/.built ## robust conversion from end to end; CONVERSION="--data fashion-mnist.npz --epochs 8" (minutes on digits)
	@mkdir -p $(RESULTS)
	$(VENV) bench/conversion.py $(CONVERSION) --json $(RESULTS)/conversion.json --plot $(RESULTS)/conversion.png

static: build/cmake/.built ## compile the GPU kernels for sm_80, sm_90, sm_100 without a GPU; registers, spills, bytes moved
	$(VENV) bench/static_gpu.py

compile-cases: build/cmake/.built ## compile drawn cases of the tests with Triton for sm_90 without a GPU; options in CASES (minutes)
	$(VENV) tests/compile_cases.py $(CASES)

sanitize: build/cmake/.built ## the CPU kernels under AddressSanitizer and UBSan
	$(WITH_CMAKE) $(VENV) tests/run_sanitized.py

mutations: build/cmake/.built ## break the kernels on purpose: each break must fail a test
	$(WITH_CMAKE) $(VENV) tests/mutations.py

# No network and no .venv: $(PYTHON) must have torch, triton and pytest. Peers may be absent, so their tests stay out.
gpu: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: ## tests and benchmark on this machine's GPU with $(PYTHON), nothing installed (under 9 minutes)
	@$(PYTHON) -c 'import torch' || { echo "make gpu: $(PYTHON) has no torch; name a Python that has: make gpu PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch finds no CUDA device here; check the driver with nvidia-smi")'
	@mkdir -p $(RESULTS) build && touch build/gpu_started
	@CMAKE_ARGS=-DFASTSNN_CUDA_ARCHITECTURES=$$($(PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
	timeout 110 $(PYTHON) setup.py -q build_ext --inplace || echo "make gpu: the build did not end well or in time (setuptools 77 or newer, CMake and g++ are needed); NVRTC (CuPy) compiles the CUDA kernels instead"
	@test -e build/cmake/lib/_fastsnn_cpu.so || echo "make gpu: there are no CPU kernels; their tests will fail"
	@$(PYTHON) -m fastsnn info
	@echo "left out: $(notdir $(GPU_IGNORED)) (packages or tools may be absent; emulated kernels run for real here)"
	@status=0; \
	workers=$$($(PYTHON) -c 'import importlib.util as u, os; print("-n %d" % min(14, max(2, len(os.sched_getaffinity(0)) - 2)) if u.find_spec("xdist") else "--cases=40")'); \
	FASTSNN_REQUIRE_KERNELS=1 timeout -s INT -k 20 230 $(PYTHON) -m pytest $$workers -rfE --durations=10 --junitxml=$(RESULTS)/gpu-tests.xml \
		tests $(addprefix --ignore=,$(GPU_IGNORED)) || status=$$?; \
	timeout -s INT -k 10 130 $(PYTHON) bench/throughput.py --device cuda $(GPU_BENCH) --json $(RESULTS)/gpu.json || status=$$?; \
	timeout -s INT -k 10 45 $(PYTHON) bench/training_step.py --device cuda --batch 64 --dtype bfloat16 --quick --json $(RESULTS)/gpu-training-step.json || status=$$?; \
	test ! $(RESULTS)/gpu.json -nt build/gpu_started || $(PYTHON) bench/throughput.py --table $(RESULTS)/gpu.json; \
	test $$status -ne 124 || echo "make gpu: a step ran past its time limit"; \
	exit $$status

wheel: .venv/.packages ## a wheel in dist/
	$(WITH_CMAKE) $(PIP) wheel -q --no-deps --no-build-isolation -w dist .

clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
	find fastsnn kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## and the environment
	rm -rf .venv
