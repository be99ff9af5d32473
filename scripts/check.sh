#!/bin/bash
# SPDX-License-Identifier: AGPL-3.0-or-later
# The inner loop: style, types, unit tests, Perl's syntax. Needs Node and node_modules only; what needs root or a program
# of the system is skipped, and says so.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ ! -e node_modules/.package-lock.json ]; then
  echo "Installing npm packages: npm ci"
  npm ci --no-audit --no-fund --loglevel=error || exit 1
fi
# npx would look for packages elsewhere, and takes its time.
bin=node_modules/.bin
failed=0

types=$(mktemp)
trap 'rm -f "$types"' EXIT
$bin/tsc --noEmit > "$types" & tsc=$! # the tests do not always need both cores
$bin/biome check . || failed=1
if command -v perl > /dev/null; then
  shopt -s globstar
  for module in perl-shim/PVE/**/*.pm; do
    # Perl says "syntax OK" on stderr, one line for each file.
    said=$(perl -T -c -I perl-shim -I fixtures/pve/lib "$module" 2>&1) || { failed=1; echo "$said"; }
  done
else
  echo "skipped: Perl's syntax: needs perl"
fi
$bin/vitest run test/unit test/architecture || failed=1
wait "$tsc" || { failed=1; cat "$types"; }
exit "$failed"
