// SPDX-License-Identifier: AGPL-3.0-or-later
// The one way to standard output and standard error. A pipe whose reader has gone, a full disk and a closed descriptor
// reach the verb as errors that it can unwind from: process.stdout would report them as events, when it is too late.
import { write, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { environmentError, errnoOf } from "../core/index.ts";

const writeAsync = promisify(write);
const STDOUT = 1;
const STDERR = 2;
/** A descriptor that another program has made non-blocking. */
const RETRY_MS = 10;

/** The reader of standard output has gone, as in `list | head -1`: not worth a message. */
export class OutputClosedError extends Error {
  override readonly name = "OutputClosedError";
}

/** Standard output could not be written. */
export class OutputError extends Error {
  override readonly name = "OutputError";
}

/**
 * Writes to standard output, outside of the event loop: a reader that waits, such as a pager, does not keep a lock from
 * being refreshed.
 *
 * @throws OutputClosedError, OutputError; the reason of `signal`
 */
export async function print(text: string, signal: AbortSignal): Promise<void> {
  const bytes = Buffer.from(text);
  for (let done = 0; done < bytes.length; ) {
    signal.throwIfAborted();
    done += await unlessAborted(writeSome(bytes.subarray(done)), signal);
  }
}

/** Writes one line to standard error. What cannot be written there is lost; the exit status remains. */
export function complain(line: string): void {
  try {
    writeSync(STDERR, `${line}\n`);
  } catch {
    // closed, full, or its reader has gone
  }
}

async function writeSome(bytes: Buffer): Promise<number> {
  try {
    return (await writeAsync(STDOUT, bytes, 0, bytes.length, null)).bytesWritten;
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === "EPIPE") throw new OutputClosedError("the reader of standard output has gone", { cause: error });
    if (errno !== "EAGAIN") {
      const { message } = environmentError("write to", "standard output", error);
      throw new OutputError(message.replace('"standard output"', "standard output"), { cause: error });
    }
    await sleep(RETRY_MS);
    return 0;
  }
}

/** Locks are released even if a write hangs; a second signal ends the process. */
async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  let onAbort = (): void => undefined;
  const aborted = new Promise<never>((_resolve, reject) => {
    onAbort = () => reject(signal.reason);
  });
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}
