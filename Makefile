# Troth. `make demo` shows it, `make test` proves it; each installs what it lacks.

SHELL := /bin/bash
comma := ,
CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/troth/target
export CARGO_TARGET_DIR
export PATH := $(HOME)/.cargo/bin:$(PATH)

# What the programs are made with: the command line, and sending spans to a collector.
FEATURES := troth-sdk/cli,troth-coordinator/otlp,troth-participant/otlp
# What everything that is checked and tested is made with: held clocks and deliberate bugs too, and file systems
# of its own if it may mount them. One set for lints, documentation, tests and fuzzers, so that all of them share
# what they compile; tests/src/lib.rs makes the programs with the same.
TEST_FEATURES := $(FEATURES),troth-tests/stack,troth-tests/mutations$(if $(filter 0,$(shell id -u)),$(comma)troth-tests/root)
# In all of the workspace, whichever program is wanted: its dependencies have the same features then.
RUN := cargo run --release --locked --features $(FEATURES) --bin

.PHONY: help setup setup-tests programs build demo test sim stack fuzz model chaos mutation mutations check fmt doc clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## system packages, and RocksDB compiled once for all
	@scripts/setup

setup-tests: ## the same, and what tests need: a headless browser, a clock that can be set, promtool
	@scripts/setup tests

programs: setup ## the servers and the command line, in target/release
	cargo build --release --locked --features $(FEATURES) --bin troth --bin troth-coordinator --bin troth-participant

build: programs ## these and the benchmarks
	cargo build --release --locked --features $(FEATURES) --bin troth-bench

demo: programs ## bank transfers on real processes; servers are killed, come and go
	target/release/troth demo $(DEMO)

test: setup-tests ## all tests
	cargo test --locked --workspace --features $(TEST_FEATURES)
	TEST_FEATURES=$(TEST_FEATURES) scripts/mutation

sim: setup ## simulate clusters from twenty thousand seeds
	$(RUN) sim -- --seeds 0..20000

stack: setup ## run the real servers on held clocks and a network in memory, from a hundred seeds
	cargo run --release --locked -p troth-tests --features stack --bin stack -- --seeds 0..100

fuzz: setup ## look for bytes that something does not take, ten minutes for each thing that takes bytes
	scripts/fuzz 600

model: setup ## explore every order of everything in small cases
	$(RUN) model -- --seconds 1800

chaos: setup-tests ## ten minutes of everything that can go wrong, for each workload; needs root
	for workload in append bank set register write-skew long-fork counter; do \
		$(RUN) chaos -- --workload $$workload --nemesis all --seconds 600 || exit 1; \
	done

mutation: setup ## the tests of anomalies must fail when transactions are not checked
	TEST_FEATURES=$(TEST_FEATURES) scripts/mutation

mutations: setup-tests ## every deliberate bug must be found; needs root
	cargo run --profile mutations --locked --features $(FEATURES),troth-tests/mutations,troth-tests/stack --bin mutations

check: setup ## formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features $(TEST_FEATURES),troth-tests/fuzz -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --features $(TEST_FEATURES),troth-tests/fuzz

fmt: ## format all code
	cargo fmt --all

doc: setup ## documentation, in target/doc
	cargo doc --locked --workspace --no-deps --features $(FEATURES)

clean: ## everything that was built but RocksDB
	rm -rf "$(CARGO_TARGET_DIR)"/debug "$(CARGO_TARGET_DIR)"/release "$(CARGO_TARGET_DIR)"/doc
