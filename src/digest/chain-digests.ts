// SPDX-License-Identifier: AGPL-3.0-or-later
// What a chain of images holds, cluster by cluster, as their files of block digests record it.
import { messageOf } from "../core/index.ts";
import type { BlockDigestFile } from "./block-file.ts";
import type { BlockRecord } from "./block-format.ts";

/** The digest of a cluster of data; "zero"; undefined where the digests do not tell. */
export type ClusterState = Buffer | "zero" | undefined;

export class ChainDigests {
  readonly #files: readonly (BlockDigestFile | undefined)[];
  readonly #onDamage: (index: number, reason: string) => void;

  /**
   * @param files from the topmost image down to the one without a backing file; undefined for an image without digests
   * @param onDamage called for each question that a file cannot answer: it is damaged, or cannot be read
   */
  constructor(files: readonly (BlockDigestFile | undefined)[], onDamage: (index: number, reason: string) => void) {
    this.#files = files;
    this.#onDamage = onDamage;
  }

  /** The state of `count` clusters from `first` on. Never rejects: what cannot be read is not known. */
  async states(first: number, count: number): Promise<ClusterState[]> {
    const states: ClusterState[] = new Array(count).fill(undefined);
    const isOpen: boolean[] = new Array(count).fill(true);
    let open = count;
    for (const [index, file] of this.#files.entries()) {
      if (open === 0) return states;
      if (file === undefined) return states; // what lies below is not known
      const found: BlockRecord[] = [];
      try {
        await file.find(first, count, (record) => found.push(record));
      } catch (error) {
        this.#onDamage(index, messageOf(error));
        return states;
      }
      for (const record of found) {
        const end = Math.min(record.cluster + record.count, first + count);
        for (let cluster = Math.max(record.cluster, first); cluster < end; cluster++) {
          const at = cluster - first;
          if (isOpen[at] !== true) continue;
          isOpen[at] = false;
          open--;
          states[at] = record.digest ?? "zero";
        }
      }
    }
    for (let at = 0; at < count; at++) if (isOpen[at] === true) states[at] = "zero"; // no image has it
    return states;
  }
}
