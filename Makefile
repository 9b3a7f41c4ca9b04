# Two cores and Python 3.11 are enough for all targets. Each of them creates or updates .venv first if needed.
.PHONY: help setup demo test check docs bench test-amx prove prove-slow parity-table
BIN := .venv/bin

help: ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

setup: ## create .venv with the pinned versions of constraints.txt
	@launch/setup/setup.sh

demo: setup ## speech -> shards -> a pretrained checkpoint, in minutes; CORPUS=FOLDER uses your own audio
	$(BIN)/auricle demo $(if $(CORPUS),"corpus=$(CORPUS)")

# three workers on two cores: tests of clusters, kills and time limits mostly wait
test: setup ## the test suite without the slow proofs; AURICLE_SPEECH=FOLDER adds the tests on real speech
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

AMX_UNIT := $(addprefix tests/unit/pretrain/,nn/test_amx.py nn/test_convolution.py profiling/test_operation_check.py)

test-amx: setup ## tests of 16-bit computation on an emulated CPU with AMX; needs gcc, binutils and avx512_bf16
	$(BIN)/python -m tests.support.amx -- -m pytest $(AMX_UNIT)
	$(BIN)/python -m tests.support.amx -- -m pytest -k bf16 tests/contract/test_objectives.py tests/contract/test_heads.py
	$(BIN)/python -m tests.support.amx -- -m tests.support.amx.table
	$(BIN)/python -m tests.support.amx -- -m tests.support.amx.random_shapes 0 60

check: setup ## format, lint, types, import layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: setup ## the documentation site, in site/; needs no network
	$(BIN)/mkdocs build --strict # --quiet would hide the warnings that --strict refuses
	@echo "open site/index.html"

bench: setup ## comparisons with other implementations; each prints ratios
	@set -e; for file in $(filter-out benchmarks/__init__.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

prove: setup ## quality of pretraining against its baselines, 40 minutes: benchmarks/results/quality.md; CORPUS=FOLDER adds audio
	$(BIN)/python benchmarks/prove/quality.py $(if $(CORPUS),--corpus "$(CORPUS)")

prove-slow: setup ## the slow proofs that `make test` leaves out
	@missed=; for proof in "-m pytest -m slow" benchmarks/prove/synthesis.py \
		"benchmarks/prove/units.py --beside benchmarks/results/synthesis.json" \
		benchmarks/prove/detectors.py benchmarks/prove/time_contrastive.py benchmarks/prove/separation.py \
		benchmarks/prove/recognition.py benchmarks/prove/style.py benchmarks/prove/out_of_domain.py "-m benchmarks.faults.soak"; do \
		echo "== $$proof"; $(BIN)/python $$proof || missed="$$missed\n  $$proof"; done; \
	if [ -n "$$missed" ]; then printf "failed, or missed a goal:$$missed\n"; exit 1; fi

parity-table: setup ## agreement with other implementations and with itself: benchmarks/results/parity.md
	$(BIN)/python -m pytest --parity-table benchmarks/results/parity.md
