// SPDX-License-Identifier: AGPL-3.0-or-later
// The only table from errors to what leaves this process.
import { type ErrorCode, firstError, HostError, messageOf, oneLine } from "../src/core/index.ts";

/** Names that only the protocol itself uses. */
type ProtocolErrorCode = "PARSE" | "INVALID_REQUEST" | "METHOD_NOT_FOUND" | "INTERNAL";

/**
 * Numbers of JSON-RPC, of its cancellation extension, and from its range for servers. Never reuse one: -32010 to
 * -32012 and -32020 belonged to version 2 of the protocol.
 */
export const RPC_ERROR_NUMBERS = {
  PARSE: -32700,
  INVALID_REQUEST: -32600,
  METHOD_NOT_FOUND: -32601,
  INVALID_PARAMS: -32602,
  INTERNAL: -32603,
  CANCELLED: -32800,
  PROTOCOL_VERSION: -32001,
  NOT_SUPPORTED: -32002,
  ENVIRONMENT: -32003,
  CHILD_PROCESS: -32004,
  SOURCE: -32013,
  UNAVAILABLE: -32030,
  NOT_FOUND: -32031,
  EXISTS: -32032,
  DAMAGED: -32033,
  BASE_UNUSABLE: -32034,
  LOCKED: -32035,
  NEWER_FORMAT: -32036,
} as const satisfies Record<ErrorCode | ProtocolErrorCode, number>;

/** An error of the protocol itself: a wrong order, an unknown method. */
export class ProtocolError extends Error {
  readonly code: ProtocolErrorCode;

  constructor(code: ProtocolErrorCode, message: string) {
    super(oneLine(message));
    this.name = "ProtocolError";
    this.code = code;
  }
}

interface RpcError {
  readonly code: number;
  readonly message: string;
  readonly data: { readonly code: ErrorCode | ProtocolErrorCode; readonly hint?: string };
}

/** An abort whose reason is another abort, and so on. */
const MAX_ABORTS = 16;

/**
 * The failure that came first: behind a SuppressedError (a dispose that failed too) stands the error
 * of the body; behind an AbortError stands the reason that the abort was given.
 */
function unwrapError(error: unknown): unknown {
  let at = firstError(error);
  for (let depth = 0; depth < MAX_ABORTS && isAbortWithReason(at); depth++) at = firstError(at.cause);
  return at;
}

function isAbortWithReason(error: unknown): error is Error {
  return error instanceof Error && error.name === "AbortError" && error.cause !== undefined;
}

/** True for a bug: its stack is worth a line on stderr. */
export function isInternal(error: unknown): boolean {
  const first = unwrapError(error);
  return !(first instanceof HostError) && !(first instanceof ProtocolError);
}

/** What the peer gets to see of `error`. */
export function toRpcError(error: unknown): RpcError {
  const first = unwrapError(error);
  if (first instanceof HostError) {
    const data = first.hint === undefined ? { code: first.code } : { code: first.code, hint: oneLine(first.hint) };
    return { code: RPC_ERROR_NUMBERS[first.code], message: first.message, data };
  }
  if (first instanceof ProtocolError) {
    return { code: RPC_ERROR_NUMBERS[first.code], message: first.message, data: { code: first.code } };
  }
  return {
    code: RPC_ERROR_NUMBERS.INTERNAL,
    message: `Internal error of the backup bridge: ${messageOf(first)}`,
    data: { code: "INTERNAL" },
  };
}
