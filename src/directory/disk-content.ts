// SPDX-License-Identifier: AGPL-3.0-or-later
// What a disk holds, while it is backed up: a digest of each cluster that the image defines, and, where a base is known
// by its digests, only what differs from it. PVE's bitmap has granules of 4 MiB; a guest rarely changes all of one.
import { CLUSTER_BYTES, type CopyContent, type CopyPiece, type Extent, isZero } from "../block/index.ts";
import {
  type BlockDigestWriter,
  type ChainDigests,
  CLUSTER_DIGEST_BYTES,
  type ClusterDigester,
  type ClusterState,
} from "../digest/index.ts";

/** Zeroes that were not read may be as long as the disk: so many clusters are compared at once. */
const COMPARE_CLUSTERS = 4096;

export class DiskContent implements CopyContent {
  readonly #digester: ClusterDigester;
  readonly #writer: BlockDigestWriter;
  readonly #base: ChainDigests | undefined;

  constructor(digester: ClusterDigester, writer: BlockDigestWriter, base: ChainDigests | undefined) {
    this.#digester = digester;
    this.#writer = writer;
    this.#base = base;
  }

  async split(step: Extent, bytes: Buffer | undefined): Promise<readonly CopyPiece[]> {
    return bytes === undefined ? await this.#splitZeroes(step) : await this.#splitData(step, bytes);
  }

  async record({ kind, offset, length, digests }: CopyPiece): Promise<void> {
    const cluster = offset / CLUSTER_BYTES;
    if (kind === "zero") await this.#writer.addZeroes(cluster, Math.ceil(length / CLUSTER_BYTES));
    else if (digests !== undefined) await this.#writer.addData(cluster, digests);
  }

  async #splitZeroes(step: Extent): Promise<CopyPiece[]> {
    if (this.#base === undefined) return [{ ...step, kind: "zero" }];
    const pieces = new Pieces(step);
    const first = step.offset / CLUSTER_BYTES;
    const end = first + Math.ceil(step.length / CLUSTER_BYTES);
    for (let at = first; at < end; at += COMPARE_CLUSTERS) {
      for (const state of await this.#base.states(at, Math.min(COMPARE_CLUSTERS, end - at))) {
        pieces.add(state === "zero" ? "same" : "zero");
      }
    }
    return pieces.finish();
  }

  async #splitData(step: Extent, bytes: Buffer): Promise<CopyPiece[]> {
    const count = Math.ceil(bytes.length / CLUSTER_BYTES);
    const states = await this.#base?.states(step.offset / CLUSTER_BYTES, count);
    const digests = Buffer.alloc(count * CLUSTER_DIGEST_BYTES);
    const pieces = new Pieces(step, digests);
    for (let index = 0; index < count; index++) {
      const start = index * CLUSTER_BYTES;
      const cluster = bytes.subarray(start, Math.min(bytes.length, start + CLUSTER_BYTES));
      pieces.add(this.#kindOf(cluster, states?.[index], digests, index * CLUSTER_DIGEST_BYTES));
    }
    return pieces.finish();
  }

  #kindOf(cluster: Buffer, state: ClusterState, digests: Buffer, at: number): CopyPiece["kind"] {
    if (isZero(cluster)) return state === "zero" ? "same" : "zero";
    this.#digester(wholeCluster(cluster), digests, at);
    if (!Buffer.isBuffer(state)) return "data";
    return digests.compare(state, 0, CLUSTER_DIGEST_BYTES, at, at + CLUSTER_DIGEST_BYTES) === 0 ? "same" : "data";
  }
}

/** The last cluster of a disk is digested as the image holds it: with zeroes up to its end. */
function wholeCluster(cluster: Buffer): Buffer {
  if (cluster.length === CLUSTER_BYTES) return cluster;
  const whole = Buffer.alloc(CLUSTER_BYTES);
  cluster.copy(whole);
  return whole;
}

/** Gathers clusters of one kind into pieces. */
class Pieces {
  readonly #step: Extent;
  readonly #digests: Buffer | undefined;
  readonly #found: CopyPiece[] = [];
  #kind: CopyPiece["kind"] = "same";
  #start = 0;
  #count = 0;

  constructor(step: Extent, digests?: Buffer) {
    this.#step = step;
    this.#digests = digests;
  }

  add(kind: CopyPiece["kind"]): void {
    if (kind !== this.#kind) this.#close();
    this.#kind = kind;
    this.#count++;
  }

  finish(): CopyPiece[] {
    this.#close();
    return this.#found;
  }

  #close(): void {
    if (this.#count === this.#start) return;
    const from = this.#start * CLUSTER_BYTES;
    const length = Math.min(this.#step.length, this.#count * CLUSTER_BYTES) - from;
    const piece = { offset: this.#step.offset + from, length, kind: this.#kind };
    const own = this.#digests?.subarray(this.#start * CLUSTER_DIGEST_BYTES, this.#count * CLUSTER_DIGEST_BYTES);
    this.#found.push(own !== undefined && this.#kind === "data" ? { ...piece, digests: own } : piece);
    this.#start = this.#count;
  }
}
