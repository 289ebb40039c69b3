# Two commands matter to a newcomer: `make serve` and `make test`. Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
SERVE := .venv/.serve
STAMP := .venv/.installed
COMPILE := uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock" pyproject.toml
# requirements.lock is for development; requirements-serve.lock, a part of it, is what an image installs: it serves
# folders of MLflow and object stores too.

# Where it is set, each of the hundreds of processes that the tests start compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install serve test check docs dist image sbom train bench peers drill conformance lock protos
install: $(STAMP)

# What serving needs, and nothing that only tests, trains or measures: a newcomer waits for this.
$(SERVE): requirements-serve.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements-serve.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

# uv, by its own hashes, installs the rest in a fifth of the time.
$(STAMP): requirements.lock $(SERVE)
	sed -n '/^uv==/,/# via/p' requirements.lock >.venv/uv.lock
	$(BIN)/pip install --quiet --require-hashes -r .venv/uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	@touch $@

serve: $(SERVE)
	$(BIN)/serving run

# Three processes on two cores, a file of tests to each: they wait for servers as long as they compute.
test: install
	$(BIN)/pytest -q --durations 20 --numprocesses 3 --dist loadfile

# Builds wheel and sdist, and tries the wheel where nothing else of this project is.
dist: install
	rm -rf dist .venv-dist
	$(BIN)/uv build --quiet --no-sources
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --require-hashes -r requirements-serve.lock
	.venv-dist/bin/pip install --quiet --no-deps dist/*.whl
	cd .venv-dist && bin/python -I $(CURDIR)/tests/installed.py $(CURDIR)/models
	sed -n 's/^\([a-z0-9][^\\]*==[^\\]*\) \\$$/\1/p' requirements.lock >.venv-dist/constraints.txt
	.venv-dist/bin/pip install --quiet --constraint .venv-dist/constraints.txt "$$(echo $(CURDIR)/dist/*.whl)[export,client]"
	cd .venv-dist && bin/python -I $(CURDIR)/tests/newcomer.py $(CURDIR)/README.md
	rm -rf .venv-dist

# What the Dockerfile does, done twice without Docker: the same bytes, their size, and a server that is well.
image: install
	$(BIN)/python -m tests.image

# Of what the image installs: names, versions, licences and what needs what, in CycloneDX.
sbom: install
	rm -rf .venv-sbom
	$(BIN)/uv venv --quiet --python $(BIN)/python .venv-sbom
	$(BIN)/uv pip install --quiet --python .venv-sbom --require-hashes -r requirements-serve.lock
	$(BIN)/uv pip install --quiet --python .venv-sbom --no-deps .
	mkdir -p dist
	$(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file dist/serving.cdx.json .venv-sbom
	rm -rf .venv-sbom

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=docs/examples $(BIN)/mypy --config-file= --strict --explicit-package-bases docs/examples
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec serving/dashboards/compose.yml
	@for lock in requirements requirements-serve; do cp $$lock.lock .venv/$$lock.lock; done
	@$(BIN)/$(COMPILE) --extra dev --output-file .venv/requirements.lock
	@$(BIN)/$(COMPILE) --constraint requirements.lock --extra mlflow --extra store --output-file .venv/requirements-serve.lock
	@for lock in requirements requirements-serve; do diff $$lock.lock .venv/$$lock.lock \
		|| { echo "$$lock.lock does not match pyproject.toml: make lock"; exit 1; }; done

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

train: install
	# skl2onnx orders nodes by hash; a fixed seed makes the same bytes every time.
	PYTHONHASHSEED=0 $(BIN)/python -W ignore -m training

bench: install
	$(BIN)/python -m benchmarks

# Other servers beside this one, each in an environment below ~/.cache; 10 minutes once these are made.
peers: install
	$(BIN)/python -m benchmarks.peers

# make drill ONLY="overload mutation" runs some.
drill: install
	$(BIN)/python -m tests.drills $(ONLY)

# What messages.py makes its classes of. A test compares.
protos: install
	cd serving/protocols/protos && ../../../$(BIN)/python -m grpc_tools.protoc -I. --descriptor_set_out=descriptors.binpb \
		$$(find . -name '*.proto' -printf '%P\n' | sort)

lock: install
	$(BIN)/$(COMPILE) --extra dev --upgrade --output-file requirements.lock
	$(BIN)/$(COMPILE) --constraint requirements.lock --extra mlflow --extra store --output-file requirements-serve.lock

# Starts the server on the shipped models and asks it, as `python -m tests.conformance --http URL` asks any other, and
# with gRPC's clients in Go, Java and Rust, where Debian's packages for them are installed; with clients that are made of
# the OpenAPI document, in Python and, where npm is there, TypeScript;
# MODELS=onnx serves the ONNX project's own backend suite instead.
conformance: install
ifeq ($(MODELS),onnx)
	$(BIN)/python -m tests.conformance.onnx_suite --verbose
	$(BIN)/python -m tests.conformance.onnx_suite --verbose --free
else
	$(BIN)/python -m tests.conformance --own --results benchmarks/results/conformance.json
	$(BIN)/python -m tests.conformance --own --protobuf7 --light --only gRPC --only grpc --quiet
	$(BIN)/python -m tests.conformance.clients
	$(BIN)/python -m tests.conformance.generated
	$(BIN)/python -m tests.conformance.mlflow_scoring
endif
