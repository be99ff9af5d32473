// SPDX-License-Identifier: AGPL-3.0-or-later
// How protocol code reads without knowing a socket: a generator yields a buffer and goes on when it
// is full. So payload lands where it belongs, and tests feed bytes in any portions.

/** Yields buffers to be filled wholly; a zero-length one counts as full at once. */
export type Receiver<T> = Generator<Buffer, T, undefined>;

/** Queues bytes for the server. */
export type Send = (bytes: Buffer) => void;

/** Receives `length` bytes into a new buffer; the caller has checked `length` against a MAX. */
export function* receiveBytes(length: number): Receiver<Buffer> {
  const bytes = Buffer.allocUnsafe(length);
  yield bytes;
  return bytes;
}

const SCRATCH_BYTES = 64 * 1024;

/** Reads over `length` bytes without keeping them. Needs no cap: memory does not follow `length`. */
export function* skipBytes(length: number): Receiver<void> {
  const scratch = Buffer.allocUnsafe(Math.min(length, SCRATCH_BYTES));
  for (let left = length; left > 0; ) {
    const part = scratch.subarray(0, Math.min(left, scratch.length));
    yield part;
    left -= part.length;
  }
}
