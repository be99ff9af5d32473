// SPDX-License-Identifier: AGPL-3.0-or-later
// What happens to backups after they are made: checking whether one can be restored (the command line checks all of
// it, a restore does before it begins), and choosing which ones a retention would remove. The store itself is read
// through src/store.
export { assertContainerRestorable, containerArchiveOf, pveRefusal } from "./container.ts";
export { prune } from "./prune.ts";
export { type Finding, verifyPoint } from "./verify.ts";
