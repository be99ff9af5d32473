// SPDX-License-Identifier: AGPL-3.0-or-later
// NBD URIs, parsed by hand: WHATWG URL would fold "." and ".." segments, which are export names here.
// Source: NBD doc/uri.md. TLS (nbds) and vsock are refused by name.

import { RequestError, UnsupportedError } from "../core/index.ts";
import { checkAddress, checkName, type NbdAddress } from "./address.ts";
import { DEFAULT_PORT } from "./constants.ts";

export interface NbdTarget {
  readonly address: NbdAddress;
  readonly exportName: string;
}

const URI_PATTERN = /^([A-Za-z][A-Za-z0-9+.-]*):\/\/([^/?#]*)(?:\/([^?#]*))?(?:\?([^#]*))?$/;
const AUTHORITY_PATTERN = /^(?:\[([0-9A-Fa-f:.]+)\]|([^:@[\]]+))(?::([0-9]{1,5}))?$/;

/**
 * Parses `nbd://host[:port]/export` and `nbd+unix:///export?socket=/path`.
 *
 * @throws RequestError if it is malformed
 * @throws UnsupportedError for TLS, vsock and unknown query parameters
 */
export function parseNbdUri(uri: string): NbdTarget {
  const match = URI_PATTERN.exec(uri);
  if (match === null) throw malformed(uri, "it is not of the form nbd://host/export or nbd+unix:///export?socket=path");
  const [, scheme = "", authority = "", name = "", query = ""] = match;
  const exportName = decodePart(uri, name);
  checkName("export name", exportName);
  const address = parseAddress(uri, scheme.toLowerCase(), authority, query);
  checkAddress(address);
  return { address, exportName };
}

function parseAddress(uri: string, scheme: string, authority: string, query: string): NbdAddress {
  const parameters = parseQuery(uri, query);
  const path = parameters.get("socket");
  switch (scheme) {
    case "nbd+unix":
      if (authority !== "") throw malformed(uri, "a unix socket has no host");
      if (path === undefined || path === "") throw malformed(uri, 'the parameter "socket" is missing');
      return { transport: "unix", path };
    case "nbd":
      if (path !== undefined) throw malformed(uri, 'the parameter "socket" belongs to nbd+unix');
      return parseAuthority(uri, authority);
    case "nbds":
    case "nbds+unix":
      throw new UnsupportedError(`Cannot use NBD URI ${JSON.stringify(uri)}: TLS is not supported`);
    default:
      throw new UnsupportedError(
        `Cannot use NBD URI ${JSON.stringify(uri)}: scheme ${JSON.stringify(scheme)} is not supported, nbd and nbd+unix are`,
      );
  }
}

function parseAuthority(uri: string, authority: string): NbdAddress {
  const match = AUTHORITY_PATTERN.exec(authority);
  if (match === null) throw malformed(uri, "it names no host, or the port is no number");
  const host = match[1] ?? decodePart(uri, match[2] ?? "");
  return { transport: "tcp", host, port: match[3] === undefined ? DEFAULT_PORT : Number(match[3]) };
}

function parseQuery(uri: string, query: string): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const part of query.split("&")) {
    if (part === "") continue;
    const equals = part.indexOf("=");
    const key = decodePart(uri, equals < 0 ? part : part.slice(0, equals));
    if (parameters.has(key)) throw malformed(uri, `the parameter ${JSON.stringify(key)} stands there twice`);
    if (key !== "socket") {
      throw new UnsupportedError(
        `Cannot use NBD URI ${JSON.stringify(uri)}: parameter ${JSON.stringify(key)} is not supported`,
      );
    }
    parameters.set(key, equals < 0 ? "" : decodePart(uri, part.slice(equals + 1)));
  }
  return parameters;
}

/** Inverse of parseNbdUri(). @throws RequestError if a part cannot stand in a URI */
export function formatNbdUri(address: NbdAddress, exportName: string): string {
  checkAddress(address);
  checkName("export name", exportName);
  const name = encodePart(exportName);
  if (address.transport === "unix") return `nbd+unix:///${name}?socket=${encodePart(address.path)}`;
  const host = address.host.includes(":") ? `[${address.host}]` : encodePart(address.host);
  const port = address.port === DEFAULT_PORT ? "" : `:${address.port}`;
  return `nbd://${host}${port}/${name}`;
}

/** Percent-codes all but unreserved characters and "/", which is plain in a path and in a query. */
function encodePart(text: string): string {
  try {
    return encodeURIComponent(text).replaceAll("%2F", "/");
  } catch (error) {
    throw new RequestError(`Cannot put ${JSON.stringify(text)} into an NBD URI: it is not valid Unicode`, {
      cause: error,
    });
  }
}

function decodePart(uri: string, text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw malformed(uri, "its percent coding is broken");
  }
}

function malformed(uri: string, state: string): RequestError {
  return new RequestError(`Cannot parse NBD URI ${JSON.stringify(uri)}: ${state}`);
}
