// SPDX-License-Identifier: AGPL-3.0-or-later
// Calls on a file whose server is another process. If that one hangs, a call cannot be interrupted, not even by
// SIGKILL, and it may write into its buffer as long as it lasts. So no call is ever abandoned: if the server is
// silent for too long, the kernel is told to abort its connection, again if it could not, and then every call ends.
import { constants } from "node:os";
import path from "node:path";
import { EnvironmentError } from "../core/index.ts";
import { loadKoffi, loadNativeLibrary } from "../host/index.ts";
import { listMounts } from "./mounts.ts";

/** How long calls in flight may take after a cancellation, and the closing. */
const LAST_CALLS_MS = 2_000;
/**
 * Each call holds one of Node's four threads for files. One stays free whatever the server does: for writing the
 * image, and for the heartbeat of the guest's lock. More calls, with more threads, were not faster.
 */
const CALLS_AT_ONCE = 3;
const LOOK_EVERY_MS = 200;
/** Source: umount2(2). */
const MNT_FORCE = 1;

/** Calls that end only when the file's server wants, or when its connection is aborted. */
export class FuseCalls {
  readonly #abort: () => boolean;
  readonly #silenceMs: number;
  readonly #waiting: Array<() => void> = [];
  #turns = CALLS_AT_ONCE;
  #inFlight = 0;
  #patienceMs: number;
  #lastAnswerMs = 0;
  #timer: NodeJS.Timeout | undefined;
  #isAborted = false;
  /** Set once a server was given up for its silence. */
  silentForMs: number | undefined;

  private constructor(abort: () => boolean, silenceMs: number) {
    this.#abort = abort;
    this.#silenceMs = silenceMs;
    this.#patienceMs = silenceMs;
  }

  /**
   * @param silenceMs how long the server of `file` may be silent while it owes an answer
   * @throws EnvironmentError if its connection could not be aborted then
   */
  static async on(file: string, silenceMs: number): Promise<FuseCalls> {
    loaded ??= loadAbort();
    const abort = loaded;
    const mountPoint = await fuseMountOf(file);
    return new FuseCalls(() => mountPoint === undefined || abort(mountPoint), silenceMs);
  }

  /** Settles when `call` does. After an abort of `signal` that is soon. */
  async run<T>(call: () => Promise<T>, signal: AbortSignal): Promise<T> {
    await this.#takeTurn();
    try {
      return await this.watch(call, signal);
    } finally {
      this.#passTurnOn();
    }
  }

  async #takeTurn(): Promise<void> {
    if (this.#turns > 0) this.#turns--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  #passTurnOn(): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.#turns++;
    else next();
  }

  /** As run(), for a call that takes no thread of ours. */
  async watch<T>(call: () => Promise<T>, signal: AbortSignal): Promise<T> {
    signal.throwIfAborted();
    const onAbort = (): void => this.#hurry();
    signal.addEventListener("abort", onAbort, { once: true });
    if (this.#inFlight++ === 0) this.#lastAnswerMs = performance.now();
    this.#timer ??= setInterval(() => this.#look(), LOOK_EVERY_MS);
    try {
      return await call();
    } finally {
      signal.removeEventListener("abort", onAbort);
      this.#lastAnswerMs = performance.now();
      if (--this.#inFlight === 0) {
        clearInterval(this.#timer);
        this.#timer = undefined;
      }
    }
  }

  /** As run(), but nothing depends on its result any more. */
  runLast<T>(call: () => Promise<T>): Promise<T> {
    this.#hurry();
    return this.run(call, new AbortController().signal);
  }

  #hurry(): void {
    this.#patienceMs = Math.min(this.#silenceMs, LAST_CALLS_MS);
    this.#lastAnswerMs = performance.now();
  }

  #look(): void {
    // This process may have been the one that slept: answers that lie waiting are taken before the verdict.
    if (this.#isOverdue()) setImmediate(() => this.#judge());
  }

  #isOverdue(): boolean {
    return this.#inFlight > 0 && performance.now() - this.#lastAnswerMs >= this.#patienceMs;
  }

  #judge(): void {
    if (this.#isAborted || !this.#isOverdue()) return;
    if (this.#patienceMs === this.#silenceMs) this.silentForMs = this.#silenceMs;
    this.#isAborted = this.#abort(); // else the next look tries again
  }
}

/** The mount point of the FUSE file system that holds `file`; undefined if there is none. Asks only the kernel. */
async function fuseMountOf(file: string): Promise<string | undefined> {
  const places = [file, path.dirname(file)];
  return (await listMounts()).find(({ point, type }) => /^fuse\b/.test(type) && places.includes(point))?.point;
}

/** Tells the kernel to abort the connection of a mount. @returns whether it has done so */
type Abort = (mountPoint: string) => boolean;

let loaded: Abort | undefined;

/**
 * By force means for FUSE: the connection is aborted. The mount itself stays and is PVE's to remove: the kernel refuses
 * that with EBUSY, the file being open. Any other answer came before the abort, or was about another mount in its
 * place. Not by a program: starting one closes copies of the file's handles, which waits for the server, too.
 */
function loadAbort(): Abort {
  const koffi = loadKoffi();
  const umount = loadNativeLibrary("libc.so.6")?.func("int umount2(const char *target, int flags)");
  if (koffi === undefined || umount === undefined) {
    throw new EnvironmentError("Cannot read through file handles: the addon koffi does not load");
  }
  return (mountPoint) => umount(mountPoint, MNT_FORCE) !== 0 && koffi.errno() === constants.errno.EBUSY;
}
