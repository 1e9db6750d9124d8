# winemon: every verb a person types. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# One after the other, also with -j: `make train release` releases what it has trained.
.NOTPARALLEL:

PYTHON := $(firstword $(wildcard /usr/bin/python3) python3)
UV := .venv/uv/bin/uv
# Quiet and offline where the cache suffices; the lock files carry the hashes.
UV_FLAGS := --quiet --no-config --no-python-downloads
# What the user's shell says to Python, pip, uv, bash and git changes no verb, but for where packages come from and the way there.
KEPT := PIP_CONFIG_FILE PIP_%INDEX_URL PIP_NO_INDEX PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_%CERT PIP_PROXY PIP_%TIMEOUT PIP_RETRIES \
  PIP_%CACHE_DIR PIP_KEYRING_PROVIDER PYTHON_KEYRING_BACKEND UV_%INDEX UV_%INDEX_URL UV_INDEX_% UV_FIND_LINKS UV_INSECURE_HOST \
  UV_SYSTEM_CERTS UV_NATIVE_TLS UV_%TIMEOUT UV_HTTP_% UV_CONCURRENT_DOWNLOADS UV_NO_CACHE UV_CACHE_DIR UV_KEYRING_PROVIDER \
  UV_CREDENTIALS_DIR UV_OFFLINE UV_%_ENDPOINT_URL
unexport $(filter-out $(KEPT),$(filter PYTHON% PIP_% UV_%,$(.VARIABLES)))
unexport VIRTUAL_ENV CONDA_PREFIX BASH_ENV CDPATH
unexport GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE GIT_PREFIX
# What is said and what is wrong come in their order, in a log too.
export PYTHONUNBUFFERED := 1
# uv trusts whom this computer trusts, such as a company's own CA.
export UV_SYSTEM_CERTS := true

.PHONY: help
help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments ---------------------------------------------------------------------------------------------------

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || ansible/debian-packages python3-venv
	@$(PYTHON) -m venv --clear .venv/uv
	@.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

# One environment for each lock file: .venv/app, .venv/training, .venv/loadtest, .venv/ansible, .venv/dev.
.venv/%/.synced: requirements/%.txt $(UV)
	@echo "environment: .venv/$*"
	@$(UV) venv $(UV_FLAGS) --clear --python $(PYTHON) .venv/$*
	@$(UV) pip sync $(UV_FLAGS) --python .venv/$* --require-hashes $<
	@touch $@

.PHONY: lock
lock: $(UV) ## write the hashed lock files of requirements/*.in; pins move only where they must (UPGRADE=1: all, to the newest)
	@cd requirements && for use in uv app training loadtest ansible dev; do \
	  ../$(UV) pip compile $(UV_FLAGS) $(if $(UPGRADE),--upgrade) --universal --python-version 3.11 --fork-strategy fewest \
	    --generate-hashes --no-emit-index-url --custom-compile-command "make lock" -o $$use.txt $$use.in; done

# --- the model and its release --------------------------------------------------------------------------------------

.PHONY: train search serve bench release wheels bundle compiler
# The model is compiled where it is trained; without a compiler it is served by scikit-learn.
compiler:
	@command -v cc >/dev/null || ! command -v apt-get >/dev/null || ansible/debian-packages gcc libc6-dev

train: .venv/training/.synced compiler ## train and evaluate; writes artifacts/ (DATA=file for another data set)
	@.venv/training/bin/python -m training.train $(if $(DATA),--data '$(DATA)')

search: .venv/training/.synced ## compare model candidates by grouped cross-validation
	@.venv/training/bin/python -m training.search

artifacts/manifest.json: | .venv/training/.synced compiler
	@.venv/training/bin/python -m training.train

serve: .venv/app/.synced | artifacts/manifest.json ## the API on this computer, without a machine
	@.venv/app/bin/gunicorn --config app/gunicorn.conf.py

bench: .venv/dev/.synced | artifacts/manifest.json ## cost and latency against the reference app, as ratios in one run
	@command -v wrk >/dev/null || ansible/debian-packages wrk
	@.venv/dev/bin/python -m tests.bench

release: | artifacts/manifest.json ## build the release archive from this commit and artifacts/
	@$(PYTHON) -m delivery.release

wheels:
	@$(PYTHON) -m delivery.wheels $(LOCK) $(MACHINE_PYTHON) $(MACHINE_ARCHITECTURE)

bundle: .venv/ansible/.synced | artifacts/manifest.json ## what machines without the internet need, in one archive (DEBIAN=12, WITH="grafana_....deb ...")
	@ansible/debian-packages apt-utils debian-archive-keyring
	@.venv/ansible/bin/python -m delivery.bundle build $(DEBIAN) $(WITH)

.PHONY: gate
gate: .venv/training/.synced .venv/ansible/.synced | artifacts/manifest.json ## the trained model against the live one: pass or refuse, with a report (CHAMPION=archive, directory or none)
	@rm -rf build/gate build/champion.tar.gz; [ -n '$(CHAMPION)' ] || [ ! -e $(INVENTORY) ] || $(ANSIBLE)/ansible-playbook -i $(INVENTORY) ansible/champion.yml
	@champion='$(CHAMPION)'; [ -n "$$champion" ] || champion=$$(ls build/champion.tar.gz 2>/dev/null || echo none); \
	  .venv/training/bin/python -m delivery.gate --champion "$$champion" $(if $(DATA),--data '$(DATA)')

# --- the machine ----------------------------------------------------------------------------------------------------

DEBIAN ?= 13
INVENTORY ?= inventory/current
ANSIBLE := .venv/ansible/bin
# The inventory of a verb: of the machine last made, or INVENTORY=...
KNOWN = test -e $(INVENTORY) || { echo "No machine is known: make one with make up or vagrant up, or say INVENTORY=..."; exit 2; }
PLAYBOOK = $(KNOWN); $(ANSIBLE)/ansible-playbook -i $(INVENTORY)

.PHONY: up down status urls verify
up: .venv/ansible/.synced ## a machine on this computer, provisioned, checked, with a table of URLs
	@DEBIAN=$(DEBIAN) ansible/up

down: .venv/ansible/.synced ## remove that machine
	@ansible/down

status: .venv/ansible/.synced ## units, targets, alerts, live release
	@$(PLAYBOOK) ansible/status.yml

urls: .venv/ansible/.synced ## one line a console: name, URL, user, password file
	@$(KNOWN); ANSIBLE_INVENTORY=$(INVENTORY) $(ANSIBLE)/python ansible/consoles.py urls

verify: .venv/ansible/.synced ## check a provisioned machine from here
	@$(PLAYBOOK) ansible/verify.yml

.PHONY: box
box: ## a Vagrant box for libvirt with a bare Debian (DEBIAN=12 for the one before): build/box/debian-13.box
	@ansible/debian-packages mmdebstrap e2fsprogs fdisk grub-common grub-pc-bin qemu-utils
	@ansible/files/build-box $(DEBIAN) build/box/debian-$(DEBIAN).box

.PHONY: publish deploy rollback smoke loadtest
# The ledger names the build of Jenkins that did it.
WHY ?= $(BUILD_TAG)
# Not by `make release`: a recipe that calls make runs even under `make -n`.
publish: .venv/ansible/.synced $(UV) | artifacts/manifest.json ## put the release of this commit and artifacts/ into the store
	@release=$$($(PYTHON) -m delivery.release) || exit; $(PLAYBOOK) ansible/publish.yml -e release="$(CURDIR)/$$release"

deploy: .venv/ansible/.synced ## make a published release live: the newest, or RELEASE=name (WHY="...")
	@$(PLAYBOOK) ansible/deploy.yml $(if $(RELEASE),-e release='$(RELEASE)') $(if $(WHY),-e "why='$(WHY)'")

rollback: .venv/ansible/.synced ## make live what was live before, or RELEASE=name
	@$(PLAYBOOK) ansible/rollback.yml $(if $(RELEASE),-e release='$(RELEASE)') $(if $(WHY),-e "why='$(WHY)'")

smoke: .venv/ansible/.synced ## do the APIs predict what training predicted?
	@$(PLAYBOOK) ansible/smoke.yml

loadtest: .venv/ansible/.synced $(if $(HERE),.venv/loadtest/.synced) ## load the API, with limits and a report (USERS= SECONDS= SHAPE= TARGET= LIMITS= HERE=1)
	@$(PLAYBOOK) ansible/loadtest.yml -e loadtest_users=$(or $(USERS),50) -e loadtest_seconds=$(or $(SECONDS),60) \
	  $(if $(SHAPE),-e loadtest_shape=$(SHAPE)) $(if $(TARGET),-e loadtest_target=$(TARGET)) \
	  $(if $(LIMITS),-e loadtest_limits=$(abspath $(LIMITS))) $(if $(HERE),-e loadtest_here=true)

.PHONY: push jenkins-plugins
push: .venv/ansible/.synced ## push this commit to the repository that Jenkins builds from
	@mkdir -p build; $(PLAYBOOK) ansible/jenkins-push.yml

jenkins-plugins: ## collect Jenkins' plugins for machines without its update centre; needs Java and the internet
	@mkdir -p build && version=$$(awk '/^jenkins_version:/ {print $$2}' roles/jenkins/defaults/main.yml) && \
	  roles/jenkins/files/fetch-plugins "$$version" roles/jenkins/files/plugins.txt build/jenkins-plugins && \
	  tar -czf build/jenkins-plugins.tar.gz -C build/jenkins-plugins . && echo build/jenkins-plugins.tar.gz

# --- checks ---------------------------------------------------------------------------------------------------------

.PHONY: rules dashboards dev check test test-all lint test-vagrant
rules: .venv/dev/.synced ## build the committed rules from monitoring/objectives.yml
	@.venv/dev/bin/python -m monitoring.rules

dashboards: .venv/dev/.synced ## build the committed dashboards from dashboards/ and the numbers of the rules
	@.venv/dev/bin/python -m dashboards

dev: ## everything that tests and linters need: packages, environments, tools
	@tests/run packages

check: ## lint, unit, rules: what needs no machine (CHECK="lint rules" for some of its stages); prints the time of each stage
	@rm -rf build/check
	@tests/run $(or $(CHECK),lint unit rules)

test: ## check, then the lifecycle of one throw-away machine
	@tests/run lint unit rules life

test-all: ## every unit test, with coverage floors, and every scenario (SCENARIO=releases: tests/e2e/test_releases.py alone)
	@tests/run $(if $(SCENARIO),scenarios,lint thorough rules scenarios)

test-vagrant: ## the VM scenario: vagrant up, plays, reload, destroy; an hour or more without KVM
	@tests/vagrant/run

lint: ## the linters alone
	@tests/run lint

# Debian's promtool without its Prometheus, which would start on this computer.
build/tools/promtool:
	@mkdir -p build/tools/deb
	@cd build/tools/deb && { apt-get -qq download promtool || apt-get -qq download prometheus; } 2>/dev/null
	@cd build/tools/deb && dpkg-deb --extract *.deb . && mv usr/bin/promtool ..
	@rm -r build/tools/deb

.PHONY: clean
clean: down ## remove the machine, its base, environments, artifacts and build output
	@sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; $$sudo rm -rf .machines
	@rm -rf .venv build artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible .coverage* inventory/current
	@echo "Kept: inventory/*/.secrets"
