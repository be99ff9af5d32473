// SPDX-License-Identifier: AGPL-3.0-or-later
// Shorthands for tests that talk to a scripted NBD server.
import { expect } from "vitest";
import type { NbdOpenOptions } from "../../../src/nbd/connection.ts";
import { NbdConnection } from "../../../src/nbd/index.ts";
import { type FakePeer, type FakeServer, type HandshakeScript, startFakeServer } from "./nbd-fake-server.ts";

/** A signal that ends a hanging test long before the runner does. */
export const patience = (): AbortSignal => AbortSignal.timeout(10_000);

type OpenOverrides = Partial<Omit<NbdOpenOptions, "address">>;

export function openNbd(server: FakeServer, overrides: OpenOverrides = {}): Promise<NbdConnection> {
  return NbdConnection.open({ address: server.address, exportName: "disk", signal: patience(), ...overrides });
}

/** The error with which a promise rejects, as a plain object. */
export async function failureOf(
  promise: Promise<unknown>,
): Promise<{ name: string; code: unknown; message: string; error: unknown }> {
  try {
    await promise;
  } catch (error) {
    expect(error).toBeInstanceOf(Error);
    const { name, message } = error as Error;
    return { name, code: (error as { code?: unknown }).code, message, error };
  }
  throw new Error("it did not fail");
}

interface Talk extends AsyncDisposable {
  readonly connection: NbdConnection;
  readonly server: FakeServer;
}

/** An open connection to a server that completes an honest handshake and then runs `script`. */
export async function talkTo(
  script: (peer: FakePeer) => Promise<void>,
  handshake: HandshakeScript = {},
  overrides: OpenOverrides = {},
): Promise<Talk> {
  const server = await startFakeServer(async (peer) => {
    await peer.handshake(handshake);
    await script(peer);
  });
  const connection = await openNbd(server, { metaContexts: Object.keys(handshake.contexts ?? {}), ...overrides });
  return {
    connection,
    server,
    async [Symbol.asyncDispose]() {
      // Ends the server first: it may be one that never hangs up by itself.
      await server[Symbol.asyncDispose]();
      await connection[Symbol.asyncDispose]();
    },
  };
}
