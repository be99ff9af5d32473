// SPDX-License-Identifier: AGPL-3.0-or-later
import type { LockTiming } from "../../../src/store/index.ts";

/** The proportions of the real ones; slow enough that a busy machine does not make a living host look dead. */
export const HOST_LOCK_TIMING: LockTiming = { heartbeatMs: 250, staleMs: 3_000, observeMs: 1_500 };
