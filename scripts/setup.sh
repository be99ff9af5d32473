#!/bin/bash
# SPDX-License-Identifier: AGPL-3.0-or-later
# Installs what the build, the tests and the demo need: Debian packages (as root) and node_modules.
# Says what it installs and is silent when there is nothing to do. With the argument "vm" also what test-vm needs.
set -euo pipefail
cd "$(dirname "$0")/.."

# command:package
needs=(
  qemu-img:qemu-utils qemu-nbd:qemu-utils qemu-storage-daemon:qemu-system-common
  nbdkit:nbdkit nbdcopy:libnbd-bin nbdfuse:libnbd-bin fusermount3:fuse3 mke2fs:e2fsprogs debugfs:e2fsprogs setpriv:util-linux
  xxhsum:xxhash zstd:zstd perl:perl jq:jq lxc-usernsexec:lxc mkfs.ext4:e2fsprogs losetup:mount
  mksquashfs:squashfs-tools squashfuse_ll:squashfuse newuidmap:uidmap pigz:pigz strace:strace setfattr:attr setfacl:acl setcap:libcap2-bin
)
[ "${1:-}" != vm ] || needs+=(qemu-system-x86_64:qemu-system-x86 busybox:busybox-static)
missing=()
for need in "${needs[@]}"; do
  command -v "${need%%:*}" > /dev/null || missing+=("${need##*:}")
done
perl -MJSON -e 1 2> /dev/null || missing+=(libjson-perl)
perl -MJSON::XS -e 1 2> /dev/null || missing+=(libjson-xs-perl) # as a node has it
if [ "${#missing[@]}" -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  echo "Installing Debian packages: ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then
    echo "This needs root: run it as root, or install them yourself with: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends --no-remove "${missing[@]}"; } > "$log" 2>&1; then
    cat "$log" >&2
    echo "Cannot install the Debian packages: apt-get failed, its output is above" >&2
    exit 1
  fi
  rm -f "$log"
fi

if [ ! -e node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  echo "Installing npm packages: npm ci"
  log=$(mktemp)
  if ! npm ci --no-audit --no-fund --loglevel=error > "$log" 2>&1; then
    cat "$log" >&2
    echo "Cannot install the npm packages: npm ci failed, its output is above" >&2
    exit 1
  fi
  rm -f "$log"
  touch node_modules/.package-lock.json
fi
