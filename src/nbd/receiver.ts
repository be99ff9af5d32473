// SPDX-License-Identifier: AGPL-3.0-or-later
// How protocol code reads without knowing a socket: a generator yields a buffer and continues when it
// is full. So payload lands where it belongs, and tests can feed bytes in any portions.

/** Yields buffers to be filled completely; a zero-length one counts as full at once. */
export type Receiver<T> = Generator<Buffer, T, undefined>;

/** Lets a receiver use the buffer it has, and returns the next one to fill; undefined once it has ended. */
export function nextBuffer(receiver: Receiver<void>): Buffer | undefined {
  for (;;) {
    const step = receiver.next();
    if (step.done === true) return undefined;
    if (step.value.length > 0) return step.value;
  }
}

/** Queues bytes for the server. */
export type Send = (bytes: Buffer) => void;

/** Receives `length` bytes into a new buffer; the caller has checked `length` against a MAX. */
export function* receiveBytes(length: number): Receiver<Buffer> {
  const bytes = Buffer.allocUnsafe(length);
  yield bytes;
  return bytes;
}

const SCRATCH_BYTES = 64 * 1024;

/** Skips `length` bytes without keeping them. It needs no limit: its memory does not grow with `length`. */
export function* skipBytes(length: number): Receiver<void> {
  const scratch = Buffer.allocUnsafe(Math.min(length, SCRATCH_BYTES));
  for (let left = length; left > 0; ) {
    const part = scratch.subarray(0, Math.min(left, scratch.length));
    yield part;
    left -= part.length;
  }
}
