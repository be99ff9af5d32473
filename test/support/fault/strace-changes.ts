// SPDX-License-Identifier: AGPL-3.0-or-later
// Reads what `strace -f -y` wrote about a Node process: the changes of file systems requested from the kernel, by
// real paths. A path through a descriptor (/proc/self/fd/23/name) is resolved by what the kernel itself said about
// that descriptor: at the open that created it, and at every later call.
import path from "node:path";

/** Every Linux call that changes a file, a directory or their metadata, or makes a change durable. */
const KIND_OF_CALL: Readonly<Record<string, string>> = {
  ...{ write: "write", pwrite64: "write", writev: "write", pwritev: "write", pwritev2: "write" },
  ...{ fsync: "sync", fdatasync: "sync", sync_file_range: "sync", syncfs: "sync", msync: "sync" },
  ...{ rename: "rename", renameat: "rename", renameat2: "rename", link: "link", linkat: "link" },
  ...{ unlink: "unlink", unlinkat: "unlink", rmdir: "rmdir", mkdir: "mkdir", mkdirat: "mkdir" },
  ...{ chmod: "chmod", fchmod: "chmod", fchmodat: "chmod", chown: "chown", fchown: "chown", lchown: "chown" },
  ...{ fchownat: "chown", truncate: "truncate", ftruncate: "truncate", symlink: "symlink", symlinkat: "symlink" },
  ...{ mknod: "mknod", mknodat: "mknod", fallocate: "fallocate", copy_file_range: "copy", sendfile: "copy" },
  ...{ splice: "copy", utimensat: "times", futimesat: "times", setxattr: "xattr", fsetxattr: "xattr" },
  ...{ lsetxattr: "xattr", io_uring_setup: "io_uring" },
};

/** For `strace -f`, whose output readChanges() reads. How a thread was created distinguishes it from a process. */
export const STRACE_ARGS: readonly string[] = [
  ...["-f", "-y", "-s", "1"],
  ...["-e", `trace=${["open", "openat", "clone", "clone3", ...Object.keys(KIND_OF_CALL)].map((call) => `?${call}`)}`],
];

export interface Change {
  readonly kind: string;
  readonly path: string;
}

/** The `path` of a deleted descriptor carries a mark, outside the brackets or inside. */
const FD_PATH = /(\d+)<(\/[^>]*?)(?:\(deleted\)| \(deleted\))?>/g;

/** Changes below `folders`, in order. Calls that failed changed nothing. */
export function readChanges(output: string, folders: readonly string[]): Change[] {
  const lines = output.split("\n");
  const threads = threadsOf(lines);
  const paths = new DescriptorPaths();
  const unfinished = new Map<string, string>();
  const changes: Change[] = [];
  for (const line of lines) {
    const [, pid = "", text = ""] = /^(\d+)\s+(.*)$/.exec(line) ?? [];
    const isNode = threads.has(pid);
    const resumed = /^<\.\.\. \w+ resumed>(.*)$/.exec(text)?.[1];
    // The kernel resolves a name when the call begins.
    const begun = resumed === undefined ? (isNode ? paths.resolve(text) : text) : (unfinished.get(pid) ?? "");
    if (text.endsWith("<unfinished ...>")) {
      unfinished.set(pid, begun.slice(0, -"<unfinished ...>".length));
      continue;
    }
    const whole = `${begun}${resumed ?? ""}`;
    if (isNode) paths.learn(whole);
    const change = parseCall(whole, folders);
    if (change !== undefined) changes.push(change);
  }
  return changes;
}

/** The first process and its threads: they share one table of descriptors. */
function threadsOf(lines: readonly string[]): Set<string> {
  const threads = new Set<string>([/^(\d+)/.exec(lines[0] ?? "")?.[1] ?? ""]);
  const isOfThread = new Map<string, boolean>();
  for (const line of lines) {
    const [, pid = "", text = ""] = /^(\d+)\s+(.*)$/.exec(line) ?? [];
    if (!/\bclone3?\b/.test(text)) continue;
    if (/^clone3?\(/.test(text)) isOfThread.set(pid, text.includes("CLONE_THREAD"));
    const made = /= (\d+)(?:<[^>]*>)?$/.exec(text)?.[1];
    if (made !== undefined && isOfThread.get(pid) === true && threads.has(pid)) threads.add(made);
  }
  return threads;
}

/** What each descriptor of one process refers to. */
class DescriptorPaths {
  readonly #paths = new Map<string, string>();

  /** `"/proc/self/fd/23/name"` in the arguments of a call becomes the real path. */
  resolve(call: string): string {
    this.#note(call);
    return call.replace(/"\/proc\/self\/fd\/(\d+)(\/[^"]*)?"/g, (whole, fd: string, rest = "") => {
      const known = this.#paths.get(fd);
      return known === undefined ? whole : `"${known}${rest}"`;
    });
  }

  /** @param call with its result: an open creates a descriptor, a rename changes the paths of many */
  learn(call: string): void {
    this.#note(call);
    const renamed = /^rename\w*\((?:[^"]*)"([^"]*)",(?:[^"]*)"([^"]*)".*= 0$/.exec(call);
    if (renamed === null) return;
    const [, from = "", to = ""] = renamed;
    for (const [fd, known] of this.#paths) {
      if (known === from || known.startsWith(`${from}/`)) this.#paths.set(fd, `${to}${known.slice(from.length)}`);
    }
  }

  #note(call: string): void {
    for (const [, fd = "", known = ""] of call.matchAll(FD_PATH)) this.#paths.set(fd, known.trimEnd());
  }
}

/** A whole call: `pwrite64(23</the/file>, "..."..., 512, 0) = 512`. */
function parseCall(line: string, folders: readonly string[]): Change | undefined {
  const [, call = "", given = "", result = ""] = /^(\w+)\((.*)\)\s+= (\d.*)$/.exec(line) ?? [];
  const isOpen = call === "openat" || call === "open";
  const args = given.replace(/AT_FDCWD<([^>]*)>, "([^"]*)"/g, (_, cwd, name) => `"${path.resolve(cwd, name)}"`);
  const paths = [
    ...`${args} ${isOpen ? result : ""}`.matchAll(/"(\/[^"]*)"|\d<(\/[^>]*?)(?:\(deleted\)| \(deleted\))?>/g),
  ];
  const below = paths
    .map((match) => (match[1] ?? match[2] ?? "").trimEnd())
    .filter((one) => folders.some((folder) => one === folder || one.startsWith(`${folder}/`)));
  // The result says what was opened, whatever name led to it.
  const file = below.at(-1);
  if (file === undefined) return undefined;
  if (!isOpen) return { kind: KIND_OF_CALL[call] ?? call, path: file };
  if (/O_CREAT/.test(args)) return { kind: "create", path: file };
  return /O_WRONLY|O_RDWR/.test(args) ? { kind: "open", path: file } : undefined;
}
