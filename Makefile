# A convenience: every target is one `python -m …` line, the same that the README shows.
#
# `.ci/interpreter` picks the Python: the current one when the dependencies are installed there,
# otherwise a virtual environment in .venv, made on first use. Name another with PYTHON=….
# Options go through ARGS: make demo ARGS="--seconds 20 --json"

ARGS ?=
SHELL := /bin/sh

.PHONY: demo run test test-slow mutants lint bench bench-full help

define with_python
	@python=$$(PYTHON="$(PYTHON)" sh .ci/interpreter $(1)) || exit 1; \
	echo "$$python -m $(strip $(2) $(ARGS))"; exec "$$python" -m $(strip $(2) $(ARGS))
endef

# Watch the indexer follow a simulated network on this machine; no internet needed.
demo:
	$(call with_python,run,indexer demo)

# Index the real network, by config/default.toml's defaults and INDEXER_… variables.
run:
	$(call with_python,run,indexer run)

# Everything that needs nothing but Python, in a few minutes.
test:
	$(call with_python,dev,pytest)

# The long tests.
test-slow:
	$(call with_python,dev,pytest -m slow)

# Likely bugs, put into a copy one by one: a test must notice each.
mutants:
	$(call with_python,dev,tests.mutants.run)

# Style, format and types.
lint:
	$(call with_python,dev,tests.lint)

# The reduced benchmarks (under 10 minutes).
bench:
	$(call with_python,run,bench all)

# The benchmarks at full size, without a time limit.
bench-full:
	$(call with_python,run,bench all --full)

# This list.
help:
	@awk '/^# /{say=substr($$0, 3)} /^[a-z-]+:$$/{sub(":", ""); printf "make %-12s%s\n", $$1, say}' Makefile
