# winemon: every verb a person types. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
UV := .venv/uv/bin/uv
# Quiet and offline where the cache suffices; the lock files carry the hashes.
UV_FLAGS := --quiet --no-config --no-python-downloads

.PHONY: help
help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments ---------------------------------------------------------------------------------------------------

$(UV): requirements/uv.txt
	@$(PYTHON) -m venv --clear .venv/uv
	@.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

# One environment for each lock file: .venv/app, .venv/training, .venv/loadtest, .venv/ansible, .venv/dev.
.venv/%/.synced: requirements/%.txt $(UV)
	@echo "environment: .venv/$*"
	@$(UV) venv $(UV_FLAGS) --clear --python $(PYTHON) .venv/$*
	@VIRTUAL_ENV=.venv/$* $(UV) pip sync $(UV_FLAGS) --require-hashes $<
	@touch $@

.PHONY: lock
lock: $(UV) ## renew the hashed lock files under requirements/
	@cd requirements && for use in uv app training loadtest ansible dev; do \
	  ../$(UV) pip compile $(UV_FLAGS) --upgrade --universal --python-version 3.11 --fork-strategy fewest \
	    --generate-hashes --no-emit-index-url --custom-compile-command "make lock" -o $$use.txt $$use.in; done
