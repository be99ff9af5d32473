// SPDX-License-Identifier: AGPL-3.0-or-later
// The memory for replies: bounded for the whole server, reused, and shared so that a client that does not read its
// replies slows the others down but never stops them.

import { KIB, MIB } from "../core/index.ts";
import { EXPORT_BLOCK_BYTES } from "./server-export.ts";

/** What one request reads at a time. */
export const PIECE_BYTES = 2 * MIB;
/** In front of the payload: a reply header, and before that the part of a block that was not asked for. */
export const PAYLOAD_AT = EXPORT_BLOCK_BYTES;
/** Around the payload: PAYLOAD_AT, and the rest of its last block. */
const MARGIN_BYTES = 2 * EXPORT_BLOCK_BYTES;
const MIN_PAYLOAD_BYTES = 64 * KIB;
/** The largest buffer. Every connection can have one at any time. */
export const RESERVE_BYTES = PIECE_BYTES + MARGIN_BYTES;

/** What one connection holds. */
export interface BufferShare {
  heldBytes: number;
}

interface Waiter {
  readonly share: BufferShare;
  readonly bytes: number;
  readonly take: (buffer: Buffer) => void;
}

/** The size of the buffer for a payload of `payloadBytes`: few sizes, so that buffers can be used again. */
export function bufferBytesFor(payloadBytes: number): number {
  let bytes = MIN_PAYLOAD_BYTES;
  while (bytes < payloadBytes) bytes *= 2;
  return bytes + MARGIN_BYTES;
}

/**
 * Buffers of a few sizes, at most `maxBytes` together, the unused ones included.
 *
 * RESERVE_BYTES are set aside for each connection. Of the rest, a connection may take as much as it leaves free: one
 * alone gets half of it, and a later one still finds some. So the share of a client that stopped reading is
 * bounded, and all others go on.
 */
export class ServerBuffers {
  readonly #maxBytes: number;
  readonly #commonBytes: number;
  readonly #spare = new Map<number, Buffer[]>();
  readonly #waiting: Waiter[] = [];
  #spareBytes = 0;
  #heldBytes = 0;
  /** What all connections hold beyond their reserve. */
  #commonHeldBytes = 0;

  /** @param maxBytes at least RESERVE_BYTES for each of `connections` */
  constructor(maxBytes: number, connections: number) {
    this.#maxBytes = maxBytes;
    this.#commonBytes = maxBytes - connections * RESERVE_BYTES;
  }

  /** All memory that this object keeps from being freed. */
  get bytes(): number {
    return this.#heldBytes + this.#spareBytes;
  }

  /** A buffer of `bytes`, which bufferBytesFor() gave; its content is anything. undefined if `share` must wait. */
  take(share: BufferShare, bytes: number): Buffer | undefined {
    if (!this.#isGranted(share, bytes)) return undefined;
    this.#account(share, bytes);
    const spare = this.#spare.get(bytes)?.pop();
    if (spare !== undefined) {
      this.#spareBytes -= bytes;
      return spare;
    }
    if (this.#heldBytes + this.#spareBytes > this.#maxBytes) this.dropSpare();
    return Buffer.allocUnsafeSlow(bytes);
  }

  /** Calls `take` once, as soon as there is a buffer; returns what ends the wait. */
  wait(share: BufferShare, bytes: number, take: (buffer: Buffer) => void): () => void {
    const waiter = { share, bytes, take };
    this.#waiting.push(waiter);
    return () => {
      const at = this.#waiting.indexOf(waiter);
      if (at >= 0) this.#waiting.splice(at, 1);
    };
  }

  release(share: BufferShare, buffer: Buffer): void {
    this.#account(share, -buffer.length);
    const spare = this.#spare.get(buffer.length);
    if (spare === undefined) this.#spare.set(buffer.length, [buffer]);
    else spare.push(buffer);
    this.#spareBytes += buffer.length;
    this.#serveWaiting();
  }

  /** Lets go of the memory that is not in use. */
  dropSpare(): void {
    this.#spare.clear();
    this.#spareBytes = 0;
  }

  #isGranted(share: BufferShare, bytes: number): boolean {
    const before = Math.max(0, share.heldBytes - RESERVE_BYTES);
    const after = Math.max(0, share.heldBytes + bytes - RESERVE_BYTES);
    return after === 0 || after <= this.#commonBytes - (this.#commonHeldBytes - before + after);
  }

  #account(share: BufferShare, bytes: number): void {
    const before = Math.max(0, share.heldBytes - RESERVE_BYTES);
    share.heldBytes += bytes;
    this.#heldBytes += bytes;
    this.#commonHeldBytes += Math.max(0, share.heldBytes - RESERVE_BYTES) - before;
  }

  /** In order, but a connection that has its share does not keep the others waiting. */
  #serveWaiting(): void {
    for (let at = 0; at < this.#waiting.length; at++) {
      const { share, bytes, take } = this.#waiting[at] as Waiter;
      const buffer = this.take(share, bytes);
      if (buffer === undefined) continue;
      this.#waiting.splice(at, 1);
      take(buffer);
      at = -1; // the taker may have changed the list
    }
  }
}
