# Troth. `make demo` shows it, `make test` proves it; each installs what it lacks.

SHELL := /bin/bash
comma := ,
CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/troth/target
export CARGO_TARGET_DIR
export PATH := $(HOME)/.cargo/bin:$(PATH)

# What the programs are made with: the command line, and sending spans to a collector.
FEATURES := troth-sdk/cli,troth-coordinator/otlp,troth-participant/otlp
# Tests mount file systems too, if they may.
TEST_FEATURES := $(FEATURES),troth-tests/stack$(if $(filter 0,$(shell id -u)),$(comma)troth-tests/root)

.PHONY: help setup setup-tests build demo test sim stack fuzz model chaos mutation mutations check fmt doc clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## system packages, and RocksDB compiled once for all
	@scripts/setup

setup-tests: ## the same, and what tests need: a headless browser, a clock that can be set, promtool
	@scripts/setup tests

build: setup ## all release binaries, in target/release
	cargo build --release --locked --workspace --bins --features $(FEATURES)

demo: build ## bank transfers on real processes; servers are killed, come and go
	target/release/troth demo

test: setup-tests ## all tests
	cargo test --locked --workspace --features $(TEST_FEATURES)
	scripts/mutation

sim: setup ## simulate clusters from twenty thousand seeds
	cargo run --release --locked -p troth-tests --bin sim -- --seeds 0..20000

stack: setup ## run the real servers on held clocks and a network in memory, from a hundred seeds
	cargo run --release --locked -p troth-tests --features stack --bin stack -- --seeds 0..100

fuzz: setup ## look for bytes that something does not take, ten minutes for each thing that takes bytes
	scripts/fuzz 600

model: setup ## explore every order of everything in small cases
	cargo run --release --locked -p troth-tests --bin model -- --seconds 1800

chaos: setup-tests ## ten minutes of everything that can go wrong, for each workload; needs root
	for workload in append bank set register write-skew long-fork counter; do \
		cargo run --release --locked -p troth-tests --bin chaos -- --workload $$workload --nemesis all --seconds 600 || exit 1; \
	done

mutation: setup ## the tests of anomalies must fail when transactions are not checked
	scripts/mutation

mutations: setup-tests ## every deliberate bug must be found; needs root
	cargo run --profile mutations --locked -p troth-tests --features mutations --bin mutations

check: setup ## formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features $(FEATURES) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --features $(FEATURES)

fmt: ## format all code
	cargo fmt --all

doc: setup ## documentation, in target/doc
	cargo doc --locked --workspace --no-deps --features $(FEATURES)

clean: ## everything that was built but RocksDB
	rm -rf "$(CARGO_TARGET_DIR)"/debug "$(CARGO_TARGET_DIR)"/release "$(CARGO_TARGET_DIR)"/doc
