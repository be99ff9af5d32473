# SPDX-License-Identifier: AGPL-3.0-or-later
# make demo, make test: the two commands of a newcomer. Both do all of their own set-up. make check: the inner loop.
.PHONY: all build check demo test test-vm unit perl-test lint bench install clean setup
SHELL := /bin/bash
PREFIX ?= /usr
DESTDIR ?=
PERL5DIR = $(DESTDIR)$(PREFIX)/share/perl5
SHAREDIR = $(DESTDIR)$(PREFIX)/share/pve-backup-host
BINDIR = $(DESTDIR)$(PREFIX)/bin
MANDIR = $(DESTDIR)$(PREFIX)/share/man

SOURCES := $(shell { find src bridge scripts fixtures test/bench test/support test/vm -name '*.ts' -o -name '*.mjs' -o -name '*.json'; } 2>/dev/null)

all: build

# Debian packages and node_modules, once; says what it installs, quietly.
setup:
	@./scripts/setup.sh

node_modules/.package-lock.json: package.json package-lock.json
	@./scripts/setup.sh

build: dist/.built

dist/.built: node_modules/.package-lock.json $(SOURCES)
	@node scripts/compile-validators.mjs
	@node scripts/build.mjs
	@touch $@

demo: setup build
	@node dist/demo.mjs

# Style, types, unit tests: under a minute, without root, programs of the system, or a network.
check:
	@./scripts/check.sh

lint: node_modules/.package-lock.json
	@npx --no-install biome check .
	@npx --no-install tsc --noEmit

# Everything that proves the product: types, style, unit, interop, hostile, fault, end to end.
test: setup build
	@./scripts/test.sh

# /dev/nbdX on a real kernel, in an emulated machine; fetches QEMU's emulator and a kernel when they are missing.
test-vm: build
	@./scripts/setup.sh vm
	@./scripts/test-vm.sh

bench: setup build
	@node dist/bench.mjs

install: build
	install -d $(PERL5DIR)/PVE/Storage/Custom $(PERL5DIR)/PVE/BackupProvider/Plugin $(SHAREDIR) $(BINDIR) $(MANDIR)/man1
	cd perl-shim && find PVE -name '*.pm' -exec install -D -m 0644 {} $(abspath $(PERL5DIR))/{} \;
	sed -i 's#/usr/share/pve-backup-host/#$(PREFIX)/share/pve-backup-host/#' $(PERL5DIR)/PVE/BackupProvider/Bridge/NodeProgram.pm
	install -m 0644 dist/bridge.mjs dist/cli.mjs dist/compress-worker.cjs $(SHAREDIR)/
	cp -r dist/node_modules $(SHAREDIR)/
	printf '#!/bin/sh\nexec /usr/bin/node %s/share/pve-backup-host/cli.mjs "$$@"\n' '$(PREFIX)' > $(BINDIR)/pve-backup-host
	chmod 0755 $(BINDIR)/pve-backup-host
	install -m 0644 packaging/man/*.1 $(MANDIR)/man1/

clean:
	rm -rf dist node_modules coverage bench-results.json
