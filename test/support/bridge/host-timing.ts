// SPDX-License-Identifier: AGPL-3.0-or-later
import type { LockTiming } from "../../../src/store/index.ts";

/** The proportions of the real ones; slow enough that a living host does not look dead on a busy machine. */
export const HOST_LOCK_TIMING: LockTiming = { heartbeatMs: 250, staleMs: 3_000, observeMs: 1_500 };
