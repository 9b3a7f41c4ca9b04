# Two cores and Python 3.11 are enough for all of it. Every target makes the environment first if need be.
.PHONY: setup demo test check bench prove prove-slow parity-table
BIN := .venv/bin

setup:
	@launch/setup/setup.sh

demo: setup ## speech -> shards -> a pretrained checkpoint in minutes; CORPUS=FOLDER uses your own audio
	$(BIN)/auricle demo $(if $(CORPUS),"corpus=$(CORPUS)")

test: setup ## the test suite, without the slowest proofs (make prove-slow)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## format, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: setup ## comparisons with peers; each prints a ratio
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

prove: setup ## does pretraining pay? half an hour, three baselines beside: benchmarks/results/quality.md
	$(BIN)/python benchmarks/prove/quality.py

prove-slow: setup ## the slower proofs that `make test` leaves out
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/prove/detectors.py
	$(BIN)/python benchmarks/prove/time_contrastive.py

parity-table: setup ## what is compared with other implementations and with itself: benchmarks/results/parity.md
	$(BIN)/python -m pytest --parity-table benchmarks/results/parity.md
