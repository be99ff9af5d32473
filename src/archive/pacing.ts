// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds a process that has no suitable limit built in below a number of bytes per second: stopped when
// it has read more than its share, continued when the share has caught up.
import type { ChildProcess } from "../host/index.ts";
import { readProcessBytes } from "./progress.ts";
import { startTimer } from "./timer.ts";

/** Short, for a process reads a gigabyte per second between two looks. */
const LOOK_EVERY_MS = 4;
/** After a release it is watched without a break for so long: on a busy machine the next look may come late. */
const WATCH_MS = 1;
/** It runs on unwatched only if its share is larger than this, which it has not used in the watches before. */
const UNWATCHED_SHARE_MS = 90;
/** After a time of reading less, it may read ahead by no more than this: more made short archives too fast. */
const MAX_CREDIT_MS = 100;

/** Decides, without reading a clock. Times are monotonic milliseconds. */
export class Pace {
  readonly #bytesPerMs: number;
  #allowedBytes = 0;
  #lastMs: number;

  constructor(bytesPerSecond: number, nowMs: number) {
    this.#bytesPerMs = bytesPerSecond / 1000;
    this.#lastMs = nowMs;
  }

  /** @returns true if the process, having read `readBytes` in all, has to stand still now */
  mustStop(readBytes: number, nowMs: number): boolean {
    const credit = readBytes + MAX_CREDIT_MS * this.#bytesPerMs;
    this.#allowedBytes = Math.min(credit, this.#allowedBytes + (nowMs - this.#lastMs) * this.#bytesPerMs);
    this.#lastMs = nowMs;
    return readBytes > this.#allowedBytes;
  }

  /** How many milliseconds of its share it has left, having read `readBytes`, at the time of the last look. */
  shareMs(readBytes: number): number {
    return (this.#allowedBytes - readBytes) / this.#bytesPerMs;
  }
}

/** Paces `tool` until disposed; it runs on then. */
export function pace(tool: ChildProcess, bytesPerSecond: number): AsyncDisposable {
  const share = new Pace(bytesPerSecond, performance.now());
  let isStopped = false;
  const setStopped = (mustStop: boolean): void => {
    if (mustStop !== isStopped) tool.send(mustStop ? "SIGSTOP" : "SIGCONT");
    isStopped = mustStop;
  };
  const timer = startTimer(LOOK_EVERY_MS, async () => {
    const startMs = performance.now();
    let readBytes = readProcessBytes(tool.pid);
    if (readBytes === undefined || tool.hasExited) return;
    setStopped(share.mustStop(readBytes, startMs));
    while (!isStopped && performance.now() - startMs < WATCH_MS) {
      readBytes = readProcessBytes(tool.pid) ?? readBytes;
      if (share.shareMs(readBytes) < 0) setStopped(true);
    }
    if (share.shareMs(readBytes) < UNWATCHED_SHARE_MS) setStopped(true);
  });
  return {
    async [Symbol.asyncDispose]() {
      await timer[Symbol.asyncDispose]();
      if (isStopped) tool.send("SIGCONT");
      isStopped = false;
    },
  };
}
