// SPDX-License-Identifier: AGPL-3.0-or-later
// Calls on a file that another process serves. If that process hangs, a call cannot be interrupted, not even by
// SIGKILL, and may write into its buffer until it ends. So no call is ever abandoned: if the server is silent for too
// long, the kernel is told to abort its connection, repeatedly until it can, and then every call ends.
import { constants } from "node:os";
import path from "node:path";
import { EnvironmentError } from "../core/index.ts";
import { loadKoffi, loadNativeLibrary } from "../host/index.ts";
import { listMounts } from "./mounts.ts";

/** How long calls in flight, and closing the file, may take after a cancellation. */
const LAST_CALLS_MS = 2_000;
/**
 * Each call occupies one of Node's four threads for files. One thread stays free whatever the server does: for writing
 * the image, and for the heartbeat of the guest's lock. More calls with more threads were not faster.
 */
const CALLS_AT_ONCE = 3;
const LOOK_EVERY_MS = 200;
/** Source: umount2(2). */
const MNT_FORCE = 1;

/** Calls that end only when the file's server answers, or when its connection is aborted. */
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
  /** Set once a server was given up because it was silent. */
  silentForMs: number | undefined;

  private constructor(abort: () => boolean, silenceMs: number) {
    this.#abort = abort;
    this.#silenceMs = silenceMs;
    this.#patienceMs = silenceMs;
  }

  /**
   * @param silenceMs how long the server of `file` may be silent while an answer is due
   * @throws EnvironmentError if its connection could not be aborted after that
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

  /** As run(), for a call that does not occupy one of our threads. */
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
    // It may be this process that was asleep: answers that are waiting are taken before the server is judged.
    if (this.#isOverdue()) setImmediate(() => this.#judge());
  }

  #isOverdue(): boolean {
    return this.#inFlight > 0 && performance.now() - this.#lastAnswerMs >= this.#patienceMs;
  }

  #judge(): void {
    if (this.#isAborted || !this.#isOverdue()) return;
    if (this.#patienceMs === this.#silenceMs) this.silentForMs = this.#silenceMs;
    this.#isAborted = this.#abort(); // otherwise the next check tries again
  }
}

/** The mount point of the FUSE file system that holds `file`; undefined if there is none. Asks only the kernel. */
async function fuseMountOf(file: string): Promise<string | undefined> {
  const places = [file, path.dirname(file)];
  return (await listMounts()).find(({ point, type }) => /^fuse\b/.test(type) && places.includes(point))?.point;
}

/** Tells the kernel to abort the connection of a mount. @returns whether the kernel has done so */
type Abort = (mountPoint: string) => boolean;

let loaded: Abort | undefined;

/**
 * For FUSE, a forced unmount aborts the connection. The mount itself stays, for PVE to remove: the kernel refuses to
 * unmount it with EBUSY because the file is open. Any other answer came before the abort, or was about another mount in
 * its place. This does not run a program, because starting one closes copies of the file's handles, and that waits for
 * the server, too.
 */
function loadAbort(): Abort {
  const koffi = loadKoffi();
  const umount = loadNativeLibrary("libc.so.6")?.func("int umount2(const char *target, int flags)");
  if (koffi === undefined || umount === undefined) {
    throw new EnvironmentError("Cannot read through file handles: the addon koffi does not load");
  }
  return (mountPoint) => umount(mountPoint, MNT_FORCE) !== 0 && koffi.errno() === constants.errno.EBUSY;
}
