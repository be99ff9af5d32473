// SPDX-License-Identifier: AGPL-3.0-or-later
// What the shim does in Perl for the process in the user namespace, for tests that play it.
import { connect } from "node:net";
import { EnvironmentError, messageOf } from "../../../src/core/index.ts";
import { HandoffChannel } from "../../../src/directory/container/container-handoff.ts";

/** Connects to a HandoffListener and shows the token. */
export async function takeHandoff(socketPath: string, token: string): Promise<HandoffChannel> {
  const socket = connect(socketPath);
  await new Promise<void>((resolve, reject) => {
    socket.once("connect", resolve);
    socket.once("error", (error) => reject(new EnvironmentError(messageOf(error), { cause: error })));
  });
  const channel = new HandoffChannel(socket);
  channel.send({ token });
  return channel;
}
