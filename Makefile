# Every target sets up what it needs, says what it installs, and works on a fresh Debian 12 with Rust, gcc,
# Python and apt. What is slow to make and the same in every clone (guests, the Python client) is kept in CACHE.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-unit test-integration test-jailed sim soak audit-seccomp fuzz check check-deny bench bench-start bench-disk bench-snapshot bench-migration bench-iscsi bench-nfs bench-jailer bench-net demo record-api record-snapshot record-migration clean \
	build monitor-dev monitor unikernel linux clients

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
CACHE := $(abspath $(or $(CORACLE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/coracle))
TRIPLE := x86_64-unknown-linux-gnu
DEV := $(TARGET)/$(TRIPLE)/debug
RELEASE := $(TARGET)/$(TRIPLE)/release

UNIKERNEL := $(TARGET)/guests/unikernel/$(TRIPLE)/release/unikernel
# A link to the directory of the manifest, which the guest's build script names.
LINUX := $(TARGET)/guests/linux
VENV := $(CACHE)/client-$(shell sha256sum tests/clients/requirements.txt | cut -c1-12)

# A target, and initiators that are not ours.
ISCSI := tgtd iscsi-readcapacity16 qemu-io qemu-iscsi
# A server, what its NFSv3 needs, and clients that are not ours.
NFS := ganesha.nfsd ganesha-vfs rpcbind nfs-cat qemu-img qemu-nfs

# What the tests and benchmarks read; see tests/src/lib.rs.
export CARGO_TARGET_DIR := $(TARGET)
export CORACLE_CACHE := $(CACHE)
export CORACLE_AGENT := $(RELEASE)/coracle-agent
export CORACLE_UNIKERNEL := $(UNIKERNEL)
export CORACLE_LINUX := $(LINUX)
export CORACLE_CLIENT_PYTHON := $(VENV)/bin/python
export CORACLE_CLIENT_SDK := $(TARGET)/clients/$(TRIPLE)/debug/coracle-client-sdk

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  TESTS=name    run only the integration tests, or soak rows, whose name contains it"
	@echo "  SEED=n    replay a seeded sample, or one seed of the simulator"
	@echo "  CELLS=name    of each table of failures run only the cells whose name contains it"
	@echo "  FUZZ_TARGET=name FUZZ_SECONDS=n    fuzz this target only, and for so long"
	@echo "  RUNS=n MS=n WORK=words ONLY=words DISK=directory    how often, how long, what, whom and where bench-disk measures"
	@echo "  FIRECRACKER=path-of-its-binary    compare with it, where a test or a benchmark can"

run: monitor linux ## Build everything and boot Linux from a disk; ends with the guest's own exit status
	tests/tools/need python3
	tests/tools/run-linux $(RELEASE) $(LINUX) $(TARGET)/run

demo: monitor unikernel ## Show a guest that moves between three hosts, one of which is killed in the middle of it (seconds once everything is built; root)
	tests/tools/need ip $(NFS)
	CORACLE_BIN=$(RELEASE)/coracle CORACLECTL_BIN=$(RELEASE)/coraclectl CORACLE_JAILER_BIN=$(RELEASE)/coracle-jailer cargo run -q -p coracle-tests --bin demo

test: test-unit test-integration ## Run the unit tests and the integration tests with seeded samples (minutes)

test-unit:
	tests/tools/need iasl $(ISCSI) $(NFS)
	cargo test --workspace --exclude coracle-tests
	cargo test -p coracle-tests --lib --test fuzz --test planted
	cd resources/guests/unikernel && CARGO_TARGET_DIR=$(TARGET)/guests/unikernel cargo test

test-integration: monitor-dev unikernel linux clients
	tests/tools/need debugfs e2fsck mke2fs iasl ip qemu-system-x86_64 strace $(ISCSI) $(NFS)
	CORACLE_BIN=$(DEV)/coracle CORACLECTL_BIN=$(DEV)/coraclectl CORACLE_JAILER_BIN=$(DEV)/coracle-jailer \
		cargo test -p coracle-tests --test integration -- $(TESTS)

# Each mode says what it has left out and why; the second runs whatever the first comes to, and both have to be well.
test-jailed: monitor-dev unikernel linux clients ## Run the integration tests with every monitor in a jail, made by root and by an ordinary user (half an hour)
	tests/tools/need debugfs e2fsck mke2fs iasl ip qemu-system-x86_64 strace $(ISCSI) $(NFS)
	@status=0; for mode in $(if $(filter 0,$(shell id -u)),root) rootless; do \
		echo "jails of mode $$mode:"; \
		CORACLE_JAILED=$$mode CORACLE_BIN=$(DEV)/coracle CORACLECTL_BIN=$(DEV)/coraclectl CORACLE_JAILER_BIN=$(DEV)/coracle-jailer \
			cargo test -p coracle-tests --test integration -- $(TESTS) 2>&1 | tee $(TARGET)/jailed-$$mode.log || status=1; \
	done; \
	echo; for mode in root rootless; do \
		log=$(TARGET)/jailed-$$mode.log; \
		if [ $$mode = root ] && [ "$$(id -u)" != 0 ]; then echo "root: not run, since you are not root"; \
		else echo "$$mode: $$(grep '^test result' $$log || echo 'ended without a result')"; fi; \
	done; exit $$status

sim: ## Run disks on a simulated host that reorders, shortens, fails and crashes: SEEDS=n of them (10,000 of each kind)
	cargo test -p coracle-storage --test sim every_image -- --nocapture
	SEEDS=$(or $(SEEDS),10000) cargo test -p coracle-storage --test sim -- --skip every_image --nocapture
	cargo test -p coracle-devices --lib tests::sim -- --nocapture

soak: monitor unikernel linux clients ## Run every matrix in full; a run that was stopped goes on where it was (hours)
	tests/tools/need debugfs e2fsck mke2fs iasl ip qemu-system-x86_64 strace $(ISCSI) $(NFS)
	CORACLE_BIN=$(RELEASE)/coracle CORACLECTL_BIN=$(RELEASE)/coraclectl CORACLE_JAILER_BIN=$(RELEASE)/coracle-jailer CORACLE_SOAK=$(TARGET)/soak/state.json \
		cargo test -p coracle-tests --test integration -- $(TESTS)
	PROPTEST_CASES=$(or $(CASES),20000) MUTATIONS=100000 cargo test --release --workspace --exclude coracle-tests

audit-seccomp: monitor unikernel linux clients ## Run the integration tests under strace, and compare what monitors ask of the kernel with their filters (an hour)
	tests/tools/need debugfs e2fsck mke2fs iasl ip qemu-system-x86_64 strace $(ISCSI) $(NFS)
	cargo build -q -p coracle-tests --bin audit-seccomp
	rm -rf $(TARGET)/audit && mkdir -m 1777 -p $(TARGET)/audit/traces && cp $(DEV)/audit-seccomp $(TARGET)/audit/coracle
	@echo "A test may fail for want of time under strace; what counts is the report. Jailed monitors are not traced."
	-CORACLE_AUDIT=$(TARGET)/audit/traces CORACLE_AUDITED=$(RELEASE)/coracle CORACLE_BIN=$(TARGET)/audit/coracle CORACLECTL_BIN=$(RELEASE)/coraclectl \
		CORACLE_JAILER_BIN=$(RELEASE)/coracle-jailer cargo test -p coracle-tests --test integration -- --skip jailer:: --skip seccomp:: --skip jail_to_jail
	CORACLE_AUDIT=$(TARGET)/audit/traces $(DEV)/audit-seccomp

FUZZ_SECONDS ?= 60
fuzz: ## Search for inputs that break a parser or a device, FUZZ_SECONDS each; what is found, make test replays
	tests/tools/need c++
	tests/tools/fuzz $(TARGET)/fuzz $(FUZZ_SECONDS) $(FUZZ_TARGET)

# cargo-deny takes minutes to compile, so the tidy test holds deny.toml's lists of licences and duplicates by
# itself (from cargo metadata); where cargo-deny is installed it reads the same file and has the last word.
check: ## Formatting, lints, documentation, licences and duplicate versions, the tidy test
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
	cd resources/guests/unikernel && export CARGO_TARGET_DIR=$(TARGET)/guests/unikernel && \
		cargo fmt --check && cargo clippy --all-targets -- -D warnings
	cd tests/clients/sdk && export CARGO_TARGET_DIR=$(TARGET)/clients && cargo fmt --check && cargo clippy --locked -- -D warnings
	cargo test -p coracle-tests --test tidy
	@if command -v cargo-deny >/dev/null; then cargo deny check licenses bans sources; fi

bench: bench-start bench-disk bench-snapshot bench-migration ## Run these four benchmarks, of starts, disks, snapshots and migrations; JSON in target/bench/ (by name: bench-iscsi, bench-nfs, bench-jailer, bench-net)

bench-start: monitor unikernel ## Start-up time, memory and size beside QEMU, and beside Firecracker if FIRECRACKER is set
	tests/tools/need qemu-system-x86_64
	CORACLE_BIN=$(RELEASE)/coracle cargo run --release -p coracle-tests --bin bench-start

bench-disk: monitor unikernel ## Disks beside QEMU, and beside Firecracker if FIRECRACKER is set: speed, latency, host CPU (20 minutes)
	tests/tools/need qemu-system-x86_64
	CORACLE_BIN=$(RELEASE)/coracle cargo run --release -p coracle-tests --bin bench-disk

bench-snapshot: monitor unikernel ## Snapshots made and loaded, beside Firecracker if FIRECRACKER is set (5 minutes)
	CORACLE_BIN=$(RELEASE)/coracle cargo run --release -p coracle-tests --bin bench-snapshot

bench-migration: monitor unikernel ## Migrations over loopback and a slow link, beside QEMU's with TLS and without (5 minutes)
	tests/tools/need qemu-system-x86_64
	CORACLE_BIN=$(RELEASE)/coracle cargo run --release -p coracle-tests --bin bench-migration

bench-iscsi: monitor unikernel ## Disks on an iSCSI target beside QEMU's initiator on the same one: speed, client CPU, idle (15 minutes)
	tests/tools/need qemu-system-x86_64 $(ISCSI)
	cargo build --release -p coracle-storage --example load
	CORACLE_BIN=$(RELEASE)/coracle CORACLE_LOAD=$(RELEASE)/examples/load cargo run --release -p coracle-tests --bin bench-iscsi

bench-nfs: monitor unikernel ## Disks on an NFS server beside QEMU's client on the same file: speed, client CPU, idle (15 minutes)
	tests/tools/need ip qemu-system-x86_64 $(NFS)
	cargo build --release -p coracle-storage --example load
	CORACLE_BIN=$(RELEASE)/coracle CORACLE_LOAD=$(RELEASE)/examples/load cargo run --release -p coracle-tests --bin bench-nfs

bench-jailer: monitor ## Starts in jails, beside Firecracker's if FIRECRACKER and FIRECRACKER_JAILER are set (a minute; root)
	CORACLE_BIN=$(RELEASE)/coracle CORACLE_JAILER_BIN=$(RELEASE)/coracle-jailer cargo run --release -p coracle-tests --bin bench-jailer

bench-net: monitor unikernel linux ## Networks, sockets and memory that goes back, beside Firecracker if FIRECRACKER is set (6 minutes; root)
	tests/tools/need ip
	CORACLE_BIN=$(RELEASE)/coracle cargo run --release -p coracle-tests --bin bench-net

record-api: unikernel ## Record what the Firecracker at FIRECRACKER= answers, for the comparison in the tests
	cargo run -p coracle-tests --bin record-api

record-snapshot: monitor-dev unikernel ## Keep a snapshot of a new format, which the tests of all later versions load
	CORACLE_BIN=$(DEV)/coracle cargo run -p coracle-tests --bin record-snapshot

record-migration: monitor-dev unikernel ## Keep a stream of a new version of the migration protocol, which all later versions take
	CORACLE_RECORD=1 CORACLE_BIN=$(DEV)/coracle CORACLECTL_BIN=$(DEV)/coraclectl CORACLE_JAILER_BIN=$(DEV)/coracle-jailer \
		cargo test -p coracle-tests --test integration -- migration::streams_that_are_kept

clean: ## Remove what was built here; the cache outside the clone stays
	rm -rf $(TARGET)

monitor-dev:
	cargo build --workspace --bins

monitor:
	cargo build --release -p coracle-vmm -p coracle-jailer -p coracle-agent -p coracle-ctl --bins

unikernel:
	cd resources/guests/unikernel && CARGO_TARGET_DIR=$(TARGET)/guests/unikernel cargo build --release --bin unikernel

linux:
	cargo build --release -p coracle-agent
	mkdir -p $(TARGET)/guests
	ln -sfn "$$(resources/guests/linux/build.sh | tail -n 1)" $(LINUX)

clients:
	tests/tools/venv $(VENV)
	cd tests/clients/sdk && CARGO_TARGET_DIR=$(TARGET)/clients cargo build --locked
