// SPDX-License-Identifier: AGPL-3.0-or-later
// The handshake phase: greeting, flags, then options until the transmission phase.

import { UnsupportedError } from "../core/index.ts";
import { HandshakeFlag } from "./constants.ts";
import { decodeGreeting, encodeClientFlags, GREETING_BYTES } from "./option-wire.ts";
import { go, type OpenedExport, requestStructuredReplies, setMetaContexts } from "./options.ts";
import { type Receiver, receiveBytes, type Send } from "./receiver.ts";

/** Reads the greeting and answers it; true if both sides agreed on NO_ZEROES. */
function* greet(send: Send): Receiver<boolean> {
  const flags = decodeGreeting(yield* receiveBytes(GREETING_BYTES));
  if ((flags & HandshakeFlag.FixedNewstyle) === 0) {
    throw new UnsupportedError("Cannot use NBD server: it does not offer the fixed newstyle negotiation");
  }
  const hasNoZeroes = (flags & HandshakeFlag.NoZeroes) !== 0;
  send(encodeClientFlags(HandshakeFlag.FixedNewstyle | (hasNoZeroes ? HandshakeFlag.NoZeroes : 0)));
  return hasNoZeroes;
}

export interface Negotiated extends OpenedExport {
  readonly hasStructuredReplies: boolean;
  /** Metadata contexts that the server accepted: id to name. */
  readonly contexts: ReadonlyMap<number, string>;
}

/** From the greeting to the first moment of the transmission phase. */
export function* negotiate(send: Send, exportName: string, metaContexts: readonly string[]): Receiver<Negotiated> {
  const hasNoZeroes = yield* greet(send);
  const hasStructuredReplies = yield* requestStructuredReplies(send);
  const contexts =
    hasStructuredReplies && metaContexts.length > 0
      ? yield* setMetaContexts(send, exportName, metaContexts)
      : new Map<number, string>();
  const opened = yield* go(send, exportName, hasNoZeroes);
  return { ...opened, hasStructuredReplies, contexts };
}
