// SPDX-License-Identifier: AGPL-3.0-or-later
// The real name of what the product reaches through a descriptor: /proc/self/fd/23/guest.conf is the file guest.conf
// in the directory that descriptor 23 is, and /proc/self/fd/23 is that directory or file itself.
import { readlinkSync } from "node:fs";
import path from "node:path";

const THROUGH_DESCRIPTOR = /^\/proc\/self\/fd\/\d+(?=\/|$)/;
/** What the kernel appends to the name of a file that no longer has one. */
const DELETED = / \(deleted\)$/;

/** An absolute path; a path through a descriptor becomes the one by which the kernel knows the file now. */
export function realPathOf(file: string): string {
  const [descriptor] = THROUGH_DESCRIPTOR.exec(file) ?? [];
  if (descriptor === undefined) return path.resolve(file);
  return `${targetOf(descriptor)}${file.slice(descriptor.length)}`;
}

/** The current path of an open file or directory; undefined for a closed descriptor. */
export function pathOfDescriptor(fd: number): string | undefined {
  return fd < 0 ? undefined : targetOf(`/proc/self/fd/${fd}`);
}

function targetOf(descriptor: string): string {
  try {
    return readlinkSync(descriptor).replace(DELETED, "");
  } catch {
    return descriptor; // closed: the caller gets ENOENT
  }
}
