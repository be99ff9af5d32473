// SPDX-License-Identifier: AGPL-3.0-or-later
// A directory of the node beside the store, full of canaries: things that a writer of the share would like to have
// read, written, removed or given other modes. Its names are those of a store, so that every path continues here
// after a link has led here. It is on a file system that records every read (strictatime), including listings of
// directories.
import { createHash } from "node:crypto";
import {
  chmodSync,
  existsSync,
  lchownSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import path from "node:path";

/** In every canary, at its beginning unless it has a format, and nowhere else: a JSON error shows ten bytes. */
export const SECRET = "Qx7kanari";
const TWO_DAYS_AGO = new Date(Date.now() - 2 * 24 * 60 * 60 * 1000);

const FOLDERS = [
  "",
  "100",
  "101",
  "100/.locks",
  "101/.locks",
  "100/failed",
  "101/failed",
  "100/qemu-1000",
  "deep/a/b/c",
];
const MORE_FOLDERS = [
  "100/.staging-x",
  "100/.trash-x",
  "101/.staging-x",
  "101/.trash-x",
  "101/lxc-1000",
  "100/qemu-2000",
];
const FILES = ["guest.conf", "firewall.conf", "drive-scsi0.qcow2", "archive.tar", "archive.sqfs", "manifest.json"];
const MORE_FILES = ["attributes.json", "state.json", ".lock", "backup.log", ".tmp-old", "qemu-1000.log", "old-reader"];
/** Files to which a hard link may be made: that changes their times and their number of names. */
const LINKABLE = "linkable";

type Facts = Readonly<Record<"mode" | "owner" | "size" | "mtime" | "ctime" | "atime" | "links", string>>;

export class HostCanaries {
  readonly path: string;
  readonly #content = new Map<string, string>();
  #facts = new Map<string, Facts>();

  private constructor(folder: string) {
    this.path = folder;
  }

  /** Something like a raw disk of the node. */
  get disk(): string {
    return path.join(this.path, "deep/disk.raw");
  }

  /** Before there are any of them. */
  static none(folder: string): HostCanaries {
    return new HostCanaries(folder);
  }

  /** @param folder may already hold a copy of a store: its files become canaries of the same size */
  static create(folder: string): HostCanaries {
    const host = new HostCanaries(folder);
    for (const one of [...FOLDERS, ...MORE_FOLDERS, LINKABLE]) {
      mkdirSync(path.join(folder, one), { recursive: true });
      for (const name of [...FILES, ...MORE_FILES]) {
        const file = path.join(folder, one, name);
        if (!existsSync(file)) writeFileSync(file, `${SECRET} ${one}/${name}\n`.repeat(3));
        else if (!name.endsWith(".json")) poison(file);
      }
    }
    writeFileSync(host.disk, Buffer.alloc(2 ** 20, `${SECRET}\n`));
    for (const file of host.#walk().keys()) {
      const found = lstatSync(file);
      chmodSync(file, found.isDirectory() ? 0o755 : file.endsWith(".conf") ? 0o644 : 0o640);
      if (file.includes("failed")) lchownSync(file, 1234, 1234);
      if (found.isFile()) host.#content.set(file, digestOf(file));
    }
    for (const file of [...host.#walk().keys()].reverse()) utimesSync(file, TWO_DAYS_AGO, TWO_DAYS_AGO);
    host.look();
    return host;
  }

  /** From here on nothing may change. */
  look(): void {
    this.#facts = this.#walk();
  }

  /** The file or directory here that is most like `relative` in the store. */
  like(relative: string, kind: "file" | "folder"): string {
    const known = relative
      .replace(/\.staging-[^/]*/, ".staging-x")
      .replace(/\.trash-[^/]*/, ".trash-x")
      .replace(/\.tmp-[^/]*/, ".tmp-old")
      .replace(/failed\/[^/]*/, "failed/qemu-1000.log")
      .replace(/\.locks\/[^/]*/, ".locks/old-reader");
    const guest = known.split("/")[0] ?? "100";
    const name = path.basename(known);
    const tried = [known, `${guest}/qemu-1000/${name}`, `${guest}/${name}`];
    tried.push(kind === "file" ? "100/guest.conf" : "100");
    for (const one of tried.map((found) => path.join(this.path, found))) {
      const found = existsSync(one) ? statSync(one) : undefined;
      if (kind === "file" ? found?.isFile() : found?.isDirectory()) return one;
    }
    throw new Error(`no canary is like "${relative}"`);
  }

  /** A file to which hard links may be made. */
  linkable(name: string): string {
    const file = path.join(this.path, LINKABLE, name);
    return existsSync(file) ? file : path.join(this.path, LINKABLE, "guest.conf");
  }

  /**
   * Checks that nothing was read, written, removed, added, or got another owner or mode since look(). Reads of the
   * files to which hard links were made do not count: the opener of such a file cannot know what it is before looking
   * at it.
   */
  expectUntouched(): void {
    const now = this.#walk();
    const changed: string[] = [];
    for (const file of new Set([...now.keys(), ...this.#facts.keys()])) {
      const [before, after] = [this.#facts.get(file), now.get(file)];
      const name = path.relative(this.path, file) || ".";
      if (before === undefined || after === undefined) {
        changed.push(`${name} is ${before === undefined ? "new" : "gone"}`);
        continue;
      }
      const isLinkable = name.startsWith(`${LINKABLE}/`);
      for (const fact of Object.keys(before) as Array<keyof Facts>) {
        if (isLinkable && ["atime", "ctime", "links"].includes(fact)) continue;
        if (before[fact] !== after[fact])
          changed.push(`${name} ${fact === "atime" ? "was read" : `has another ${fact}`}`);
      }
    }
    this.look(); // the next check starts afresh
    if (changed.length > 0) throw new Error(`the node's own files: ${changed.slice(0, 6).join("; ")}`);
  }

  /** Checks that every canary still has its content. Reads them all: look() follows. */
  expectSameContent(): void {
    const isSame = ([file, digest]: [string, string]): boolean => existsSync(file) && digestOf(file) === digest;
    const changed = [...this.#content].filter((one) => !isSame(one)).map(([file]) => path.relative(this.path, file));
    this.look();
    if (changed.length > 0) throw new Error(`the node's own files hold something else: ${changed.join(", ")}`);
  }

  /** Looks at a directory before listing it, and resets its access time: our own listing is a read, too. */
  #walk(): Map<string, Facts> {
    const found = new Map<string, Facts>();
    const visit = (folder: string): void => {
      found.set(folder, factsOf(folder));
      const entries = readdirSync(folder, { withFileTypes: true });
      utimesSync(folder, TWO_DAYS_AGO, TWO_DAYS_AGO);
      for (const entry of entries) {
        const file = path.join(folder, entry.name);
        if (entry.isDirectory()) visit(file);
        else found.set(file, factsOf(file));
      }
    };
    visit(this.path);
    return found;
  }
}

/** The same size, another content: an equal length does not protect a reader that follows the link. */
function poison(file: string): void {
  const bytes = readFileSync(file);
  const mark = Buffer.from(`# ${SECRET}\n`);
  // For an image, the end: its header and its tables stay intact.
  mark.copy(bytes, file.endsWith(".conf") ? 0 : Math.max(0, bytes.length - mark.length));
  writeFileSync(file, bytes);
}

const digestOf = (file: string): string => createHash("sha256").update(readFileSync(file)).digest("hex");

function factsOf(file: string): Facts {
  const found = lstatSync(file, { bigint: true });
  const isFolder = found.isDirectory();
  return {
    mode: found.mode.toString(8),
    owner: `${found.uid}:${found.gid}`,
    size: String(found.size),
    mtime: String(found.mtimeNs),
    // Resetting a directory's access time, after our own look into it, changes this one.
    ctime: isFolder ? "" : String(found.ctimeNs),
    atime: String(found.atimeNs),
    links: String(found.nlink),
  };
}
