// SPDX-License-Identifier: AGPL-3.0-or-later
export { type ArchiveContents, inspectArchive } from "./inspect.ts";
export type { ArchiveSummary } from "./job.ts";
export { writeSquashfs } from "./squashfs.ts";
export { tarFileName, writeTar } from "./tar.ts";
export { verifyArchive } from "./verify.ts";
