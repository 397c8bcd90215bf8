# keepstep: `make help` lists what there is.

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

demo: servers ## Watch Redis keep in step with a throw-away Postgres; Ctrl-C ends it and leaves nothing behind
	cargo build --release
	target/release/keepstep demo

test: servers ## Run every test, those against real servers too
	cargo test

test-matrix: servers ## The tests against Postgres 14 to 18 and Valkey 8, fetched into .matrix/
	tests/matrix.sh

lint: ## Formatting, clippy, the documentation build, dependencies
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
	if command -v cargo-deny; then cargo deny check; else echo "skipped: cargo install --locked cargo-deny"; fi

servers: ## Install Postgres and Redis where they are missing (Debian, Ubuntu)
	@tests/install.sh

.PHONY: help demo test test-matrix lint servers
