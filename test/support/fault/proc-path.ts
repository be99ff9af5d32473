// SPDX-License-Identifier: AGPL-3.0-or-later
// What the product reaches through a descriptor, by its real name: /proc/self/fd/23/guest.conf is the file guest.conf
// in whatever folder descriptor 23 is, and /proc/self/fd/23 is that folder or file itself.
import { readlinkSync } from "node:fs";
import path from "node:path";

const THROUGH_DESCRIPTOR = /^\/proc\/self\/fd\/\d+(?=\/|$)/;
/** What the kernel adds to the name of a file that has none any more. */
const DELETED = / \(deleted\)$/;

/** An absolute path; one through a descriptor becomes the one that the kernel knows for it now. */
export function realPathOf(file: string): string {
  const [descriptor] = THROUGH_DESCRIPTOR.exec(file) ?? [];
  if (descriptor === undefined) return path.resolve(file);
  return `${targetOf(descriptor)}${file.slice(descriptor.length)}`;
}

/** The path of an open file or folder as it is now; undefined for a closed descriptor. */
export function pathOfDescriptor(fd: number): string | undefined {
  return fd < 0 ? undefined : targetOf(`/proc/self/fd/${fd}`);
}

function targetOf(descriptor: string): string {
  try {
    return readlinkSync(descriptor).replace(DELETED, "");
  } catch {
    return descriptor; // closed: whoever uses it gets ENOENT
  }
}
