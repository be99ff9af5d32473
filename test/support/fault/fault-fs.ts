// SPDX-License-Identifier: AGPL-3.0-or-later
// Makes the Nth change of a file system fail. It stands between the product and Node's file functions: import it
// before the product. test/fault/nth-seen.test.ts compares its records with what the kernel really gets to see.
import fs from "node:fs";
import type { FileHandle } from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";
import { constants } from "node:os";
import path from "node:path";
import { isFull } from "./full-matrix.ts";
import { pathOfDescriptor, realPathOf } from "./proc-path.ts";

/** Operations that change a file system or make a change durable; "open" means opening an existing file for writing. */
export type FaultKind =
  | "create"
  | "open"
  | "write"
  | "sync"
  | "close"
  | "rename"
  | "mkdir"
  | "rmdir"
  | "unlink"
  | "link"
  | "chmod"
  | "chown"
  | "truncate";

const ERRNOS = ["ENOSPC", "EIO", "EROFS", "EDQUOT", "ENOENT", "EACCES"] as const;
type FaultErrno = (typeof ERRNOS)[number];

const turns = new Map<FaultKind, number>();

/**
 * The errnos for a step of this kind: all of them, or the next one, so that each errno gets its turn with each kind.
 */
export function errnosFor(kind: FaultKind): readonly FaultErrno[] {
  if (isFull) return ERRNOS;
  const turn = turns.get(kind) ?? 0;
  turns.set(kind, turn + 1);
  return [ERRNOS[turn % ERRNOS.length] ?? "EIO"];
}

export interface Operation {
  readonly kind: FaultKind;
  /** The file that it changes; for a rename or a link, the new name. */
  readonly path: string;
}

/**
 * An operation of a run, identified by what it is and how many of the same kind came before: the same one in the next
 * run.
 */
export interface Step {
  readonly name: string;
  readonly kind: FaultKind;
  readonly occurrence: number;
}

const nameOf = ({ kind, path: file }: Operation): string =>
  `${kind} ${file
    .replace(/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, "*")
    .replace(/\b(qemu|lxc)-\d+/g, "$1-*")
    .replace(/\b(restore|handoff)-\d+-\d+/g, "$1-*")}`;

/** The steps of a run, in order. */
export function stepsOf(operations: readonly Operation[]): Step[] {
  const counts = new Map<string, number>();
  return operations.map((operation) => {
    const name = nameOf(operation);
    counts.set(name, (counts.get(name) ?? 0) + 1);
    return { name, kind: operation.kind, occurrence: counts.get(name) ?? 1 };
  });
}

export interface Fault {
  readonly at: Pick<Step, "name" | "occurrence">;
  readonly errno: FaultErrno;
  /**
   * before: it fails and has done nothing. after: it is done and fails, as when a network share loses the reply.
   * onwards: it fails, and so does everything later that this errno can hit: the disk stays full, the share stays
   * away. short: a part is written, the next write of that file fails. partial: a part of it is written, and nothing
   * fails at all.
   */
  readonly flavour: "before" | "after" | "onwards" | "short" | "partial";
}

/**
 * What goes on failing while the cause lasts: a full disk still accepts renames and removals, a denied access affects
 * only operations on names.
 */
const LASTING: Readonly<Record<FaultErrno, (kind: FaultKind) => boolean>> = {
  ENOSPC: (kind) => ["create", "write", "mkdir", "link"].includes(kind),
  EDQUOT: (kind) => ["create", "write", "mkdir", "link"].includes(kind),
  EROFS: (kind) => kind !== "close",
  EACCES: (kind) => !["write", "sync", "close"].includes(kind),
  EIO: () => true,
  ENOENT: () => true,
};

type Verdict = "do" | "before" | "after" | "short";

/** Counts the operations below some directories, and makes one of them fail. There is one per process. */
class FaultSwitch {
  readonly operations: Operation[] = [];
  /** The operation that failed first. */
  fired: Operation | undefined;
  #folders: readonly string[] = [];
  #fault: Fault | undefined;
  /** How often the name of the fault's step occurred. */
  #seen = 0;
  #shortened: string | undefined;

  /** From now on operations below `folders` are recorded; `fault` happens to them. */
  arm(folders: readonly string[], fault?: Fault): void {
    this.operations.length = 0;
    this.fired = undefined;
    this.#folders = folders;
    this.#fault = fault;
    this.#seen = 0;
    this.#shortened = undefined;
  }

  disarm(): void {
    this.#folders = [];
    this.#fault = undefined;
  }

  /** @param file as returned by realPathOf() */
  isWatched(file: string): boolean {
    return this.#folders.some((folder) => file === folder || file.startsWith(`${folder}/`));
  }

  judge(operation: Operation): Verdict {
    this.operations.push(operation);
    const fault = this.#fault;
    if (fault === undefined) return "do";
    const { at, errno, flavour } = fault;
    const { kind } = operation;
    const isShortened = flavour === "short" && kind === "write" && this.#shortened === operation.path;
    if (isShortened) return "before";
    if (nameOf(operation) === at.name) this.#seen++;
    const isHere = nameOf(operation) === at.name && this.#seen === at.occurrence;
    const goesOn = flavour === "onwards" && this.#seen >= at.occurrence && LASTING[errno](kind);
    if (!isHere && !goesOn) return "do";
    this.fired ??= operation;
    if (flavour === "after") return "after";
    if (flavour === "before" || flavour === "onwards") return "before";
    this.#shortened = operation.path;
    return "short";
  }

  error({ kind, path: file }: Operation): NodeJS.ErrnoException {
    const code = this.#fault?.errno ?? "EIO";
    const errno = -constants.errno[code as keyof typeof constants.errno];
    return Object.assign(new Error(`${code}: injected, ${kind} '${file}'`), { code, errno, syscall: kind, path: file });
  }
}

export const faultSwitch = new FaultSwitch();

/** A call that names something: it changes it, or looks at it. */
export interface NamedCall {
  readonly kind: FaultKind | "read" | "look" | "list";
  /** What it names; for a rename or a link, both names. */
  readonly paths: readonly string[];
}

let beforeCall: ((call: NamedCall) => void) | undefined;

/** Runs `hook` before every call that names something; its synchronous work is done before the call is made. */
export function onNamedCall(hook: ((call: NamedCall) => void) | undefined): void {
  beforeCall = hook;
}

function announce(kind: NamedCall["kind"], ...files: unknown[]): void {
  beforeCall?.({ kind, paths: files.map((file) => realPathOf(String(file))) });
}

interface Act<T> {
  readonly work: () => Promise<T>;
  /** Does a part of the operation. */
  readonly part?: () => Promise<T>;
  /** Releases what `work` got when its reply is lost. */
  readonly drop?: (value: T) => Promise<void>;
}

async function perform<T>(kind: FaultKind, file: string, { work, part = work, drop }: Act<T>): Promise<T> {
  const operation = { kind, path: realPathOf(file) };
  if (!faultSwitch.isWatched(operation.path)) return await work();
  const verdict = faultSwitch.judge(operation);
  if (verdict === "do") return await work();
  if (verdict === "short") return await part();
  if (verdict === "after") {
    const value = await work();
    await drop?.(value);
  }
  throw faultSwitch.error(operation);
}

const real = { ...fs.promises };

type Flags = string | number | undefined;

function kindOfOpen(flags: Flags): FaultKind | undefined {
  const { O_CREAT, O_RDWR, O_WRONLY } = fs.constants;
  if (typeof flags === "number") return flags & O_CREAT ? "create" : flags & (O_WRONLY | O_RDWR) ? "open" : undefined;
  if (flags === undefined || flags === "r") return undefined;
  return flags.startsWith("r") ? "open" : "create";
}

async function openWatched(file: fs.PathLike, flags?: Flags, mode?: fs.Mode): Promise<FileHandle> {
  const name = String(file);
  const work = (): Promise<FileHandle> => real.open(file, flags, mode);
  const kind = kindOfOpen(flags);
  announce(kind ?? "read", name);
  const handle =
    kind === undefined ? await work() : await perform(kind, name, { work, drop: (opened) => opened.close() });
  const opened = pathOfDescriptor(handle.fd) ?? name;
  if (faultSwitch.isWatched(opened)) wrapHandle(handle, kind !== undefined);
  return handle;
}

/** A part of a write, in whole blocks where possible: the kernel, too, cuts a direct write at a block. */
const partOf = (length: number): number => (length >= 8192 ? Math.floor(length / 8192) * 4096 : Math.ceil(length / 4));

/** Its operations carry the name that the file has at that time: it may have been renamed while it was open. */
function wrapHandle(handle: FileHandle, isForWriting: boolean): void {
  const on = <T>(kind: FaultKind, act: Act<T>): Promise<T> => perform(kind, pathOfDescriptor(handle.fd) ?? "", act);
  const own = {
    write: handle.write.bind(handle) as (...args: unknown[]) => Promise<{ bytesWritten: number }>,
    writev: handle.writev.bind(handle),
    sync: handle.sync.bind(handle),
    datasync: handle.datasync.bind(handle),
    truncate: handle.truncate.bind(handle),
    chmod: handle.chmod.bind(handle),
    chown: handle.chown.bind(handle),
    close: handle.close.bind(handle),
  };
  const write = async (data: Buffer | string, offset = 0, length?: number, position: number | null = null) => {
    const bytes = typeof data === "string" ? Buffer.from(data) : data;
    const whole = length ?? bytes.length - offset;
    return await on("write", {
      work: () => own.write(bytes, offset, whole, position),
      part: () => own.write(bytes, offset, partOf(whole), position),
    });
  };
  const wrapped = {
    write,
    writev: (pieces: readonly Buffer[], position?: number) =>
      on("write", {
        work: () => own.writev(pieces, position),
        part: () => {
          const bytes = Buffer.concat(pieces);
          return own.writev([bytes.subarray(0, partOf(bytes.length))], position);
        },
      }),
    // As Node's own function, which finishes short writes.
    writeFile: async (data: Buffer | string) => {
      const bytes = Buffer.from(data as string);
      for (let done = 0; done < bytes.length; ) done += (await write(bytes, done)).bytesWritten;
    },
    sync: () => on("sync", { work: own.sync }),
    datasync: () => on("sync", { work: own.datasync }),
    truncate: (length?: number) => on("truncate", { work: () => own.truncate(length) }),
    chmod: (mode: fs.Mode) => on("chmod", { work: () => own.chmod(mode) }),
    chown: (uid: number, gid: number) => on("chown", { work: () => own.chown(uid, gid) }),
    // The number is free after a failed close, too, according to close(2).
    close: async () => {
      if (!isForWriting || handle.fd < 0) return await own.close();
      const file = pathOfDescriptor(handle.fd) ?? "";
      await own.close();
      await perform("close", file, { work: async () => undefined });
    },
  };
  Object.assign(handle, wrapped);
}

/**
 * As Node's own function, in steps: every name that is removed is an operation; one that stays does not stop the
 * others.
 */
async function removeWatched(file: fs.PathLike, options: fs.RmOptions = {}): Promise<void> {
  const name = String(file);
  if (!faultSwitch.isWatched(realPathOf(name))) return await real.rm(file, options);
  const found = await fs.promises.lstat(name).catch((error: NodeJS.ErrnoException) => {
    if (options.force === true && error.code === "ENOENT") return undefined;
    throw error;
  });
  if (found === undefined) return;
  if (!found.isDirectory()) return await fs.promises.unlink(name);
  if (options.recursive !== true) throw Object.assign(new Error("EISDIR"), { code: "EISDIR", syscall: "rm" });
  let first: unknown;
  for (const entry of await fs.promises.readdir(name)) {
    await removeWatched(path.join(name, entry), options).catch((error: unknown) => {
      first ??= error;
    });
  }
  if (first !== undefined) throw first;
  await fs.promises.rmdir(name);
}

/** As Node's own function: create, write, close. */
async function writeFileWatched(file: unknown, data: unknown, options?: unknown): Promise<void> {
  const simple = (typeof options === "object" && options !== null ? options : {}) as { mode?: number; flag?: string };
  if (typeof file !== "string" || !faultSwitch.isWatched(realPathOf(file))) {
    return await real.writeFile(file as string, data as string, options as fs.WriteFileOptions);
  }
  await using handle = await openWatched(file, simple.flag ?? "w", simple.mode ?? 0o666);
  await handle.writeFile(data as string);
}

/** A change that is made by name or names. */
const named =
  <A extends unknown[]>(kind: FaultKind, call: (...args: A) => Promise<unknown>, names = 1) =>
  (...args: A): Promise<unknown> => {
    announce(kind, ...args.slice(0, names));
    return perform(kind, String(args[names - 1]), { work: () => call(...args) });
  };

const looked =
  (kind: NamedCall["kind"], call: (...args: never[]) => Promise<unknown>) =>
  (...args: unknown[]): Promise<unknown> => {
    announce(kind, args[0]);
    return call(...(args as never[]));
  };

Object.assign(fs.promises, {
  open: openWatched,
  rm: removeWatched,
  writeFile: writeFileWatched,
  rename: named("rename", real.rename, 2),
  link: named("link", real.link, 2),
  unlink: named("unlink", real.unlink),
  rmdir: named("rmdir", real.rmdir),
  mkdir: named("mkdir", real.mkdir as typeof fs.promises.rmdir),
  chmod: named("chmod", real.chmod),
  chown: named("chown", real.chown),
  readFile: looked("read", real.readFile),
  readdir: looked("list", real.readdir),
  opendir: looked("list", real.opendir),
  ...Object.fromEntries(
    (["lstat", "stat", "readlink", "statfs", "realpath", "access"] as const).map((name) => [
      name,
      looked("look", real[name]),
    ]),
  ),
});
syncBuiltinESMExports();
