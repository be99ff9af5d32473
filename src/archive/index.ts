// SPDX-License-Identifier: AGPL-3.0-or-later
export { extractFile, listTar, type TarMember } from "./browse.ts";
export { type ArchiveContents, inspectArchive, inspectSquashfs, inspectTar } from "./inspect.ts";
export type { ArchiveCompression, ArchiveJob, ArchiveSummary } from "./job.ts";
export { squashfsFlags, writeSquashfs } from "./squashfs.ts";
export { tarFileName, tarFlags, writeTar } from "./tar.ts";
export { verifyArchive } from "./verify.ts";
