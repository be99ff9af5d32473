#!/bin/bash
# SPDX-License-Identifier: AGPL-3.0-or-later
# The whole proof: types, style, TypeScript tests, Perl tests. Ends with "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
export REQUIRE_TOOLS=1
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
passed=0
failed=0
declare -a recap=() # what failed, again at the end: it may be far up in a long log

step() { # name command...
  local name=$1
  shift
  if "$@" > "$results/log" 2>&1; then
    passed=$((passed + 1))
    echo "ok      $name"
  else
    failed=$((failed + 1))
    recap+=("$name")
    echo "FAILED  $name"
    cat "$results/log"
  fi
}

npx --no-install tsc --noEmit > "$results/types" 2>&1 & types=$! # the tests do not always need both cores
step "style" npx --no-install biome check .

npx --no-install vitest run --reporter=default --reporter=json --outputFile.json="$results/vitest.json"
vitest=$?
step "types" eval 'wait "$types" || { cat "$results/types"; false; }'
if [ -s "$results/vitest.json" ]; then
  read -r vp vf < <(node -e '
    const r = JSON.parse(require("fs").readFileSync(process.argv[1], "utf8"));
    // A file that cannot even load has no tests of its own, yet it failed.
    const broken = r.testResults.filter((f) => f.status === "failed" && f.assertionResults.every((a) => a.status !== "failed")).length;
    console.log(r.numPassedTests, r.numFailedTests + broken);' "$results/vitest.json")
  mapfile -O "${#recap[@]}" -t recap < <(node -e '
    const r = JSON.parse(require("fs").readFileSync(process.argv[1], "utf8"));
    const line = (...parts) => console.log(parts.join(": ").replace(/\s+/g, " ").slice(0, 500));
    for (const file of r.testResults.filter((f) => f.status === "failed")) {
      const name = require("path").relative(".", file.name);
      const tests = file.assertionResults.filter((a) => a.status === "failed");
      if (tests.length === 0) line(name, file.message);
      for (const test of tests) line(name, test.fullName, ...test.failureMessages);
    }' "$results/vitest.json")
  passed=$((passed + vp))
  failed=$((failed + vf))
  [ "$vitest" -eq 0 ] || [ "$vf" -gt 0 ] || failed=$((failed + 1))
else
  failed=$((failed + 1))
fi

# /dev/nbdX on a real kernel, where one can be booted. The machine has one core, and so do the Perl tests.
vm=
if [ "$(uname -m)" = x86_64 ]; then
  { ./scripts/setup.sh vm && ./scripts/test-vm.sh; } > "$results/vm" 2>&1 & vm=$!
fi

for t in perl-shim/t/*.t; do
  step "$t" prove -T -I perl-shim -I fixtures/pve/lib "$t"
done

if [ -n "$vm" ]; then
  wait "$vm"
  cat "$results/vm"
  read -r vp vf < <(sed -nE '$s/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$results/vm") || vf=1 # it did not get so far
  passed=$((passed + ${vp:-0}))
  failed=$((failed + vf))
  [ "$vf" -eq 0 ] || recap+=("make test-vm")
else
  echo "skipped make test-vm: it boots a kernel for x86_64"
fi

for line in "${recap[@]}"; do echo "FAILED  $line"; done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
