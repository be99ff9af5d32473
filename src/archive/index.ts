// SPDX-License-Identifier: AGPL-3.0-or-later
// Archives of a container's file systems: tar by GNU tar, squashfs by mksquashfs, each from and into open files;
// what is in one, and whether it can be read to its end. Programs are started by host. Where an archive lies, what
// it is called there and when it is trusted is for store and directory to decide.
export { type ArchiveContents, inspectArchive } from "./inspect.ts";
export type { ArchiveSummary } from "./job.ts";
export { writeSquashfs } from "./squashfs.ts";
export { tarFileName, writeTar } from "./tar.ts";
