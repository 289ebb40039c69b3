# Two commands matter to a newcomer: `make serve` and `make test`. Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LOCK := uv pip compile --quiet --universal --generate-hashes --extra dev --python-version 3.11 \
	--custom-compile-command "make lock" pyproject.toml

.PHONY: install serve test check train bench lock
install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

serve: install
	$(BIN)/serving run

test: install
	$(BIN)/pytest -q

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@cp requirements.lock .venv/lock && $(BIN)/$(LOCK) --output-file .venv/lock && diff requirements.lock .venv/lock \
		|| { echo "requirements.lock does not match pyproject.toml: make lock"; exit 1; }

train: install
	# skl2onnx orders nodes by hash; a fixed seed makes the same bytes every time.
	PYTHONHASHSEED=0 $(BIN)/python -W ignore -m training

bench: install
	$(BIN)/python -m benchmarks

lock:
	$(BIN)/$(LOCK) --upgrade --output-file requirements.lock
