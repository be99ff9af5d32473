// SPDX-License-Identifier: AGPL-3.0-or-later
// What both archivers are asked to do, and what they answer.

export type ArchiveCompression = "none" | "zlib" | "zstd";

/** One archive to write. Paths are inside the namespace of this process. */
export interface ArchiveJob {
  /** Where the container's file systems are mounted. */
  readonly directory: string;
  /** One per mounted volume, relative to `directory`: "./", "./mnt/data", or "." alone. */
  readonly sources: readonly string[];
  /** GNU tar's patterns: "/..." is anchored at `directory`, others match after any slash. "lost+found" is always added. */
  readonly excludePatterns: readonly string[];
  readonly compression: ArchiveCompression;
  /** Bytes read per second; 0 means no limit. */
  readonly bandwidthLimit: number;
  /** Open read-write at position 0, empty. For squashfs the file must belong to our user: the tool opens it again. */
  readonly archiveFd: number;
  readonly inUserNamespace: boolean;
  readonly log: (level: "info" | "warn" | "err", message: string) => void;
  readonly signal: AbortSignal;
}

export interface ArchiveSummary {
  /** Members of the archive: files, directories and everything else. */
  readonly files: number;
  /** Bytes read from the container. */
  readonly bytes: number;
  readonly warnings: number;
}
