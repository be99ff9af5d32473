// SPDX-License-Identifier: AGPL-3.0-or-later
// What is done to backups after they were made. Today that is verification: whether a backup can be restored, asked by
// the command line for the whole of it and by a restore before it begins. The store itself is read through src/store.
export { assertContainerRestorable, containerArchiveOf, pveRefusal } from "./container.ts";
export { type Keep, markBackups, type PruneCandidate, type PruneMark } from "./prune.ts";
export { type Finding, verifyPoint } from "./verify.ts";
