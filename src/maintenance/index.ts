// SPDX-License-Identifier: AGPL-3.0-or-later
// What is done to backups after they were made: whether one can be restored, asked by the command line for all of it and
// by a restore before it begins; and which ones a retention would remove. The store itself is read through src/store.
export { assertContainerRestorable, containerArchiveOf, pveRefusal } from "./container.ts";
export { markBackups } from "./prune.ts";
export { type Finding, verifyPoint } from "./verify.ts";
