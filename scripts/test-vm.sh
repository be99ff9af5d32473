#!/bin/bash
# SPDX-License-Identifier: AGPL-3.0-or-later
# Runs test/vm in a virtual machine: Debian's cloud kernel, whose nbd.ko the machine at hand may not have, under
# QEMU's own emulation (TCG), so it needs neither KVM nor privileges of the host. Ends with "N passed, N failed".
# The kernel comes through apt, is only unpacked (no boot loader hears of it), and stays in a cache.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pve-backup-host/vm
meta=linux-image-cloud-amd64

fail() {
  echo "$1" >&2
  echo "0 passed, 1 failed"
  exit 1
}

newest_kernel() { # folder of the kernel unpacked last; nothing if there is none
  find "$cache" -mindepth 2 -maxdepth 2 -name vmlinuz -printf '%T@ %h\n' 2> /dev/null | sort -rn | head -n 1 | cut -d' ' -f2-
}

real_package() { # the versioned package behind the meta package; nothing if apt knows none
  apt-cache depends "$meta" 2> /dev/null | sed -n 's/^ *Depends: \(linux-image-.*-cloud-amd64\)$/\1/p' | head -n 1
}

fetch_kernel() {
  local package work log kernel
  package=$(real_package)
  if [ -z "$package" ]; then
    apt-get update -qq > /dev/null 2>&1 || true
    package=$(real_package)
  fi
  [ -n "$package" ] || fail "Cannot get a kernel: apt knows no package $meta, see /etc/apt/sources.list"
  echo "Downloading the test kernel: $package"
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/unpack.XXXXXX")
  log=$work/log
  # Lists that are too old name a version that the mirror has no longer.
  if ! (cd "$work" && { apt-get download -qq "$package" || { apt-get update -qq && apt-get download -qq "$package"; }; }) > "$log" 2>&1; then
    cat "$log" >&2
    rm -rf "$work"
    fail "Cannot get a kernel: apt-get download $package failed, its output is above"
  fi
  dpkg-deb -x "$work"/*.deb "$work/files"
  kernel=$work/kernel
  mkdir "$kernel"
  cp "$work"/files/boot/vmlinuz-* "$kernel/vmlinuz"
  find "$work/files" \( -name 'nbd.ko*' -o -name 'fuse.ko*' \) -exec cp {} "$kernel" \;
  [ -n "$(find "$kernel" -name 'nbd.ko*')" ] || { rm -rf "$work"; fail "Cannot use the kernel $package: it has no nbd.ko"; }
  rm -rf "${cache:?}/$package"
  mv "$kernel" "$cache/$package"
  rm -rf "$work"
}

[ "$(uname -m)" = x86_64 ] || fail "Cannot run the test machine on $(uname -m): its kernel is for x86_64"
[ -n "$(newest_kernel)" ] || fetch_kernel
exec node dist/test-vm.mjs "$(newest_kernel)"
