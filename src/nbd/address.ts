// SPDX-License-Identifier: AGPL-3.0-or-later
// Where an NBD server listens, and the checks of names that are sent to it.

import { RequestError } from "../core/index.ts";
import { MAX_STRING_BYTES } from "./constants.ts";

export type NbdAddress =
  | { readonly transport: "unix"; readonly path: string }
  | { readonly transport: "tcp"; readonly host: string; readonly port: number };

/** "unix:/run/x.sock" or "tcp:host:port", for messages. */
export function describeAddress(address: NbdAddress): string {
  if (address.transport === "unix") return `unix:${address.path}`;
  const host = address.host.includes(":") ? `[${address.host}]` : address.host;
  return `tcp:${host}:${address.port}`;
}

/** @throws RequestError for a path or host that is empty or contains NUL, or a port outside 1..65535 */
export function checkAddress(address: NbdAddress): void {
  const place = address.transport === "unix" ? address.path : address.host;
  if (place === "" || place.includes("\0")) {
    throw new RequestError(`Cannot use NBD address ${JSON.stringify(place)}: it is empty or holds a NUL character`);
  }
  if (address.transport === "tcp" && !(Number.isInteger(address.port) && address.port > 0 && address.port < 65_536)) {
    throw new RequestError(`Cannot use NBD port ${address.port}: it is not in 1..65535`);
  }
}

/**
 * Checks a string for the protocol: at most 4096 bytes of UTF-8, no NUL.
 *
 * @param what names the string in the message, e.g. "export name"
 * @throws RequestError if it is not that
 */
export function checkName(what: string, name: string): void {
  const bytes = Buffer.byteLength(name);
  if (bytes > MAX_STRING_BYTES) {
    throw new RequestError(`Cannot use NBD ${what}: it has ${bytes} bytes, at most ${MAX_STRING_BYTES} are allowed`);
  }
  if (name.includes("\0")) {
    throw new RequestError(`Cannot use NBD ${what} ${JSON.stringify(name)}: it holds a NUL character`);
  }
}
