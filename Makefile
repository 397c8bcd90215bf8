# keepstep: `make help` lists what there is.

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

demo: servers ## Watch Redis keep in step with a throw-away Postgres; Ctrl-C ends it and leaves nothing behind; SOURCE=outbox for one without logical decoding
	cargo build --release
	target/release/keepstep demo $(if $(SOURCE),--source $(SOURCE))

test: servers ## Run every test, those against real servers too
	cargo test

test-outbox: servers ## The tests against real servers once more, with an outbox as the source of changes
	KEEPSTEP_TEST_SOURCE=outbox cargo test --test integration -- $$(sed 's/ .*//; s/^/--skip /' tests/not-for-the-outbox.txt)

test-matrix: servers ## The tests against Postgres 14 to 18 and Valkey 8, fetched into .matrix/
	tests/matrix.sh

bench: servers ## What keepstep costs, next to what Postgres's and Redis's own tools cost; QUICK=1 takes two minutes
	cargo bench --bench bench -- $(if $(QUICK),--quick)

bench-micro: ## What each step of a change costs in time and allocations, without servers
	cargo bench --bench micro -- --sort location

instructions: ## The regression guard: instructions and allocations per change, against ceilings (needs valgrind)
	cargo bench --bench instructions

soak: servers ## The long tests in full: pgbench at scale 10 with twenty kills, fifty in mid-warm, a transaction of two million rows, verify under all that the servers can do
	KEEPSTEP_SOAK=1 cargo test --release --test integration -- pgbench:: large:: heals::after_kills verify::no_false_alarm

lint: ## Formatting, clippy, the documentation build, dependencies
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
	if command -v cargo-deny; then cargo deny check; else echo "skipped: cargo install --locked cargo-deny"; fi

fuzz: ## Fuzz each parser of outside bytes for a minute (needs nightly Rust and cargo-fuzz)
	for target in $$(cargo +nightly fuzz list --fuzz-dir tests/fuzz); do \
		cargo +nightly fuzz run --fuzz-dir tests/fuzz $$target -- -max_total_time=60 || exit 1; \
	done

servers: ## Install Postgres and Redis where they are missing (Debian, Ubuntu)
	@tests/install.sh

.PHONY: help demo test test-outbox test-matrix bench bench-micro instructions fuzz soak lint servers
