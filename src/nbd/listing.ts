// SPDX-License-Identifier: AGPL-3.0-or-later
// What a server offers, asked on a separate connection: exports and metadata contexts.

import { checkName } from "./address.ts";
import { NbdServerError } from "./errors.ts";
import { greet } from "./handshake.ts";
import { encodeAbort, listExports, listMetaContextNames, requestStructuredReplies } from "./options.ts";
import type { Receiver, Send } from "./receiver.ts";
import { openSession, type SessionOptions } from "./session.ts";

interface NbdExportEntry {
  readonly name: string;
  readonly description: string;
}

/**
 * NBD_OPT_LIST: the exports that the server lists, in its order.
 *
 * @throws NbdServerError if the server refuses to list; NbdConnectionError, NbdProtocolError
 */
export function listNbdExports(options: SessionOptions): Promise<NbdExportEntry[]> {
  return ask(options, function* (send) {
    yield* greet(send);
    return yield* listExports(send);
  });
}

interface ListMetaContextsOptions extends SessionOptions {
  readonly exportName: string;
  /** E.g. "qemu:dirty-bitmap:" for all contexts of that kind; empty or absent: every context. */
  readonly queries?: readonly string[];
}

/**
 * NBD_OPT_LIST_META_CONTEXT: the names of one export's metadata contexts.
 *
 * @throws NbdServerError if the server refuses, e.g. because the export does not exist
 */
export async function listMetaContexts(options: ListMetaContextsOptions): Promise<string[]> {
  const { exportName, queries = [] } = options;
  checkName("export name", exportName);
  for (const query of queries) checkName("metadata context query", query);
  return await ask(options, function* (send) {
    yield* greet(send);
    if (!(yield* requestStructuredReplies(send))) {
      throw new NbdServerError("Cannot list metadata contexts: the NBD server does not offer structured replies", {
        errno: "NBD_REP_ERR_UNSUP",
      });
    }
    return yield* listMetaContextNames(send, exportName, queries);
  });
}

async function ask<T>(options: SessionOptions, handshake: (send: Send) => Receiver<T>): Promise<T> {
  const { channel, result } = await openSession(options, { handshake });
  await channel.close(encodeAbort());
  return result;
}
