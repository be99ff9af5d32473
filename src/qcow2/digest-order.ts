// SPDX-License-Identifier: AGPL-3.0-or-later
// The order in which an image is digested: the head is written last, so it is digested last.
import type { FileRange } from "../digest/index.ts";
import { HEAD_BYTES } from "./constants.ts";

/** `(tail -c +65537 F; head -c 65536 F) | xxhsum -H2` prints the digest of these ranges. */
export const DIGEST_ORDER: readonly FileRange[] = [{ start: HEAD_BYTES }, { start: 0, end: HEAD_BYTES }];
