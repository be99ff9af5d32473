// SPDX-License-Identifier: AGPL-3.0-or-later

/** More errors than this are only counted. */
const MAX_REPORTED_ERRORS = 20;

/** The result of a check. The image is sound if `errorCount` is 0; leaks only waste space. */
export interface CheckReport {
  /** The first errors, one line each. */
  readonly errors: readonly string[];
  readonly errorCount: number;
  /** Clusters whose refcount is higher than the number of references. */
  readonly leakedClusters: number;
  readonly dataClusters: number;
  readonly compressedClusters: number;
  readonly zeroClusters: number;
  readonly fileBytes: number;
}

/** Collects errors, in bounded memory. */
export class ErrorList {
  readonly errors: string[] = [];
  count = 0;

  add(error: string): void {
    this.count++;
    if (this.errors.length < MAX_REPORTED_ERRORS) this.errors.push(error);
  }
}
