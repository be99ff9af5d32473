// SPDX-License-Identifier: AGPL-3.0-or-later
// What is done to backups after they were made.
export { type Keep, markBackups, type PruneCandidate, type PruneMark } from "./prune.ts";
