// SPDX-License-Identifier: AGPL-3.0-or-later
// The transmission phase as the server receives it: requests, and what is wrong with them.
// Source: NBD doc/proto.md, "Request types" and "Error values".

import { CommandFlag, CommandType, ErrorValue, MAX_PAYLOAD_BYTES } from "./constants.ts";
import { type Receiver, skipBytes } from "./receiver.ts";
import type { ChosenExport } from "./server-options.ts";
import { decodeRequest, type NbdRequest, REQUEST_BYTES } from "./wire.ts";

/**
 * Reads requests and passes each to `accept`, a WRITE when its payload is gone.
 *
 * @returns true if the client said DISC; false if what it sends cannot be understood, so that nothing after it can
 */
export function* receiveRequests(accept: (request: NbdRequest) => void): Receiver<boolean> {
  const header = Buffer.alloc(REQUEST_BYTES);
  for (;;) {
    yield header;
    const request = decodeRequest(header);
    if (request === undefined) return false;
    if (request.type === CommandType.Disc) return true;
    if (request.type === CommandType.Write) {
      if (request.length > MAX_PAYLOAD_BYTES) return false;
      yield* skipBytes(request.length);
    }
    accept(request);
  }
}

/** The error that `request` must be answered with; 0 if it is one that this export can be asked. */
export function checkRequest(request: NbdRequest, chosen: ChosenExport): number {
  const { type, flags, offset, length } = request;
  if (type === CommandType.Write || type === CommandType.Trim || type === CommandType.WriteZeroes) {
    return ErrorValue.Eperm;
  }
  const isInside = length > 0 && offset + length <= chosen.export.sizeBytes;
  if (type === CommandType.Read) {
    const allowed = chosen.hasStructuredReplies ? CommandFlag.Df : 0;
    return isInside && length <= MAX_PAYLOAD_BYTES && (flags & ~allowed) === 0 ? 0 : ErrorValue.Einval;
  }
  if (type === CommandType.BlockStatus) {
    return isInside && chosen.hasAllocation && (flags & ~CommandFlag.ReqOne) === 0 ? 0 : ErrorValue.Einval;
  }
  return ErrorValue.Einval;
}
