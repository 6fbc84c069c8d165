# Every task of the project; `make help` lists them. CI is .ci/run, which calls these targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_NO_INPUT := 1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[36m%-18s\033[0m %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Catalens needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements/standalone.txt | $(BIN)/python
	$(PIP) install -q --require-hashes -r requirements/standalone.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt
	$(PIP) install -q --require-hashes -r requirements/dev.txt
	@touch $@

$(VENV)/.torch: $(VENV)/.dev requirements/torch.txt
	$(PIP) install -q --require-hashes -r requirements/torch.txt
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## install the command at .venv/bin/catalens

.PHONY: models
models: $(VENV)/.torch ## install what `catalens model pull`, `verify` and `quantize` need (torch: gigabytes)

.PHONY: dev
dev: $(VENV)/.dev ## install what tests and checks need, and the git hooks
	@if [ -d .git ]; then $(BIN)/pre-commit install >/dev/null; fi

.PHONY: demo
demo: install ## start the standalone process, import the demo catalogue, print the page's address
	@exec $(BIN)/catalens demo

.PHONY: serve
serve: install ## start the standalone process on 127.0.0.1:8080
	@exec $(BIN)/catalens serve

.PHONY: check
check: $(VENV)/.dev ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: engines
engines: $(VENV)/.dev ## Apache Kafka and Redis for the tests, where they can be had; what is missing is said
	@scripts/ensure-kafka
	@scripts/ensure-redis
	@scripts/ensure-kustomize
	@scripts/ensure-promtool

.PHONY: test
test: engines ## unit, contract, service and end-to-end tests
	$(BIN)/python -m pytest

.PHONY: test-browser
test-browser: $(VENV)/.dev ## the page in a real headless Chromium
	@scripts/ensure-chromium
	$(BIN)/python -m pytest tests/browser

.PHONY: test-torch
test-torch: $(VENV)/.torch ## the encoder against torch and transformers (gigabytes)
	$(BIN)/python -m pytest tests/torch

BENCH_SEARCH ?=
OVERLOAD_MINUTES ?= 10
GPU_PYTHON ?= $(BIN)/python
CHAOS_KILLS ?= 20
CHAOS_SECONDS ?= 120
.PHONY: test-chaos
test-chaos: engines ## kill -9 of everything: CHAOS_KILLS (20) of one process, CHAOS_SECONDS (120) a scenario of a cluster
	CHAOS_KILLS=$(CHAOS_KILLS) CHAOS_SECONDS=$(CHAOS_SECONDS) $(BIN)/python -m pytest tests/chaos --timeout 3000

.PHONY: bench-standalone
bench-standalone: $(VENV)/.dev ## import and search figures of the standalone process
	$(BIN)/python -m benchmarks.standalone

.PHONY: bench-pipeline
bench-pipeline: engines ## events/s through Kafka, ingest over HTTP, freshness
	$(BIN)/python -m benchmarks.pipeline

.PHONY: bench-soak
bench-soak: engines ## memory over SOAK_MINUTES (30) at full load
	$(BIN)/python -m benchmarks.soak

.PHONY: bench-search
bench-search: $(VENV)/.dev ## searches on 100,000 products beside faiss and Qdrant's local mode; BENCH_SEARCH="--products 1000000"
	$(BIN)/python -m benchmarks.search $(BENCH_SEARCH)

.PHONY: bench-overload
bench-overload: $(VENV)/.dev ## twice the capacity over OVERLOAD_MINUTES (10): what is answered, refused and remembered
	$(BIN)/python -m benchmarks.overload --minutes $(OVERLOAD_MINUTES)

.PHONY: bench-cutoffs
bench-cutoffs: $(VENV)/.dev ## one min_score for every query: chosen on some drawings, judged on others and the demo
	$(BIN)/python -m benchmarks.cutoffs

.PHONY: bench-relevance
bench-relevance: $(VENV)/.dev ## modes, languages and typos on the demo's photographs and the clip-art set
	$(BIN)/python -m benchmarks.relevance

.PHONY: bench-composed
bench-composed: $(VENV)/.dev ## a picture and words: combiners and weights on the demo
	$(BIN)/python -m benchmarks.composed

.PHONY: bench-tags
bench-tags: $(VENV)/.dev ## how often zero-shot tags are right on the demo
	$(BIN)/python -m benchmarks.tags

.PHONY: bench-autoscaling
bench-autoscaling: engines ## start of a worker by phase, the autoscaling simulator, the capacity table
	$(BIN)/python -m benchmarks.autoscaling

BENCH_ENCODER ?=
.PHONY: bench-encoder
bench-encoder: $(VENV)/.torch ## CLIP ViT-B/32 beside its peers; BENCH_ENCODER="--quick --only bulk,latency" for a part
	$(BIN)/python -m benchmarks.encoder $(BENCH_ENCODER)

.PHONY: bench-gpu
bench-gpu: ## the same model on this machine's GPU; takes the python that holds torch: make bench-gpu GPU_PYTHON=python3
	$(GPU_PYTHON) -m benchmarks.gpu

.PHONY: reference
reference: $(VENV)/.dev ## write docs/reference/{settings,metrics}.md, asyncapi.json, .env.example, dashboards and the PrometheusRule again
	$(BIN)/python scripts/settings_reference.py
	$(BIN)/python scripts/metrics_reference.py
	$(BIN)/python scripts/event_reference.py
	$(BIN)/python scripts/monitoring.py

.PHONY: screenshots
screenshots: $(VENV)/.dev ## take the README's screenshots in a real browser
	@scripts/ensure-chromium
	$(BIN)/python scripts/screenshots.py

IMAGES ?= ingest embedder query standalone
IMAGE_REGISTRY ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
IMAGE = $(if $(IMAGE_REGISTRY),$(IMAGE_REGISTRY)/)catalens-$(1):$(VERSION)
IMAGE_BUILD = docker buildx build --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
  --build-arg CREATED=$$(git log -1 --format=%cI)
SCANNER ?= anchore/grype:v0.118.0

.PHONY: images
images: ## build the container images (docker with buildx); IMAGES="torch cuda" builds those that are gigabytes
	$(foreach name,$(IMAGES),$(IMAGE_BUILD) --load --target $(name) --tag $(call IMAGE,$(name)) . &&) true

.PHONY: image-check
image-check: $(VENV)/.dev ## carry out the Dockerfile without a container engine, start what comes out, print sizes
	$(BIN)/python -m scripts.image_check

.PHONY: image-digests
image-digests: ## pin base and engine images to the digests that the registry answers with (docker with buildx)
	$(PYTHON) scripts/image_digests.py

.PHONY: image-scan
image-scan: ## look for known holes in the images that were built; fails on those for which there is a mended version
	@mkdir -p .cache
	$(foreach name,$(IMAGES),docker save --output .cache/$(name).tar $(call IMAGE,$(name)) && \
	  docker run --rm --volume $(CURDIR)/.cache/$(name).tar:/image.tar:ro $(SCANNER) --only-fixed --fail-on high docker-archive:/image.tar &&) true

.PHONY: images-push
images-push: ## build and push the images to IMAGE_REGISTRY, with SBOM and provenance
	@test -n "$(IMAGE_REGISTRY)" || { echo "name a registry: make images-push IMAGE_REGISTRY=host/path"; exit 1; }
	$(foreach name,$(IMAGES),$(IMAGE_BUILD) --push --sbom=true --provenance=mode=max --target $(name) --tag $(call IMAGE,$(name)) . &&) true

.PHONY: images-sign
images-sign: ## sign what was pushed, by its digest (cosign)
	$(foreach name,$(IMAGES),cosign sign --yes $(call IMAGE,$(name))@$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $(call IMAGE,$(name))) &&) true

.PHONY: upgrade-drill
upgrade-drill: engines ## a rolling upgrade from OLD=<git ref> to this checkout and back, on real engines under load
	$(BIN)/python -m scripts.upgrade_drill $(OLD)

.PHONY: check-k8s
check-k8s: $(VENV)/.dev ## build every overlay with every combination of components and check what comes out
	@scripts/ensure-kustomize
	CATALENS_TEST_ALL_COMBINATIONS=true $(BIN)/python -m pytest tests/unit/test_k8s.py

RELEASE ?=
.PHONY: release-check
release-check: ## the tag RELEASE is this version, and the changelog has it
	@test "$(RELEASE)" = "v$(VERSION)" || { echo "RELEASE is $(RELEASE), pyproject.toml says $(VERSION)"; exit 1; }
	@grep -q '^## \[$(VERSION)\]' CHANGELOG.md || { echo "CHANGELOG.md has no section [$(VERSION)]"; exit 1; }

.PHONY: release
release: release-check $(VENV)/.dev ## make the release of the tag RELEASE, with the wheel and the changelog's words (gh)
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	awk '/^## \[/ { on = index($$0, "## [$(VERSION)]") == 1; next } on' CHANGELOG.md > dist/notes.md
	gh release create "$(RELEASE)" --verify-tag --title "Catalens $(VERSION)" --notes-file dist/notes.md dist/*.whl

STARTER_PYTHON ?= python3.12
.PHONY: starter-model
starter-model: ## rebuild the bundled starter model from its ingredients (Python 3.12, npm, apt; half an hour)
	$(STARTER_PYTHON) -m venv .cache/starter-venv
	.cache/starter-venv/bin/python -m pip install -q -r models/starter/requirements.txt
	.cache/starter-venv/bin/python models/starter/build.py

UV_COMPILE = $(BIN)/uv pip compile -q pyproject.toml --universal --generate-hashes --no-emit-index-url \
  --custom-compile-command 'make lock' --python-version 3.11
.PHONY: lock
lock: | $(BIN)/python ## resolve the dependencies again into requirements/*.txt
	$(PIP) install -q uv
	$(UV_COMPILE) $(LOCK_FLAGS) --extra standalone --group build -o requirements/standalone.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra standalone --extra server --extra onnx --group build --group dev --group browser -c requirements/standalone.txt -o requirements/dev.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra standalone --extra server --extra onnx --extra torch --extra quantize --group build --group dev --group browser -c requirements/dev.txt -o requirements/torch.txt
	$(subst pyproject.toml,,$(UV_COMPILE)) $(LOCK_FLAGS) --group image -c requirements/dev.txt -o requirements/image-build.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra kafka --extra redis --extra objects --extra tracing -c requirements/dev.txt -o requirements/image-ingest.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra encoder --extra server -c requirements/dev.txt -o requirements/image-encoder.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra standalone --extra server -c requirements/dev.txt -o requirements/image-standalone.txt
	$(UV_COMPILE) $(LOCK_FLAGS) --extra encoder --extra cli --extra server --extra onnx --extra torch --extra quantize -c requirements/torch.txt -o requirements/image-torch.txt

.PHONY: clean
clean: ## remove the environment and caches, never your data
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
