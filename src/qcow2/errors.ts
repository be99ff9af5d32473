// SPDX-License-Identifier: AGPL-3.0-or-later
import { HostError } from "../core/index.ts";

/** The image itself is malformed, damaged, or of a kind that we refuse: retrying does not help. */
export class Qcow2FormatError extends HostError {
  override readonly code = "DAMAGED";
}
