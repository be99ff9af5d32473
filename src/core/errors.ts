// SPDX-License-Identifier: AGPL-3.0-or-later
// The errors that this software raises on purpose. Everything else is a bug and surfaces as INTERNAL.
import { oneLine, shortPath } from "./text.ts";

/** Stable for programs: RPC peers and the exit code table act on these. */
export type ErrorCode =
  | "CANCELLED"
  | "ENVIRONMENT"
  | "INVALID_PARAMS"
  | "NOT_SUPPORTED"
  | "PROTOCOL_VERSION"
  | "CHILD_PROCESS"
  | "SOURCE"
  | "UNAVAILABLE"
  | "NOT_FOUND"
  | "EXISTS"
  | "DAMAGED"
  | "NEWER_FORMAT"
  | "BASE_UNUSABLE"
  | "LOCKED";

export interface HostErrorOptions {
  cause?: unknown;
  hint?: string;
}

/** Base of every error that we raise on purpose. `message` is one line, suitable for the PVE task log. */
export abstract class HostError extends Error {
  /** Stable for programs; `message` may change between releases. */
  abstract readonly code: ErrorCode;
  /** What the administrator can do next, if we know. */
  readonly hint: string | undefined;

  constructor(message: string, options: HostErrorOptions = {}) {
    super(oneLine(message), "cause" in options ? { cause: options.cause } : undefined);
    this.name = new.target.name;
    this.hint = options.hint;
  }
}

/** The caller asked for something that is invalid in itself: a bad name, an impossible value. */
export class RequestError extends HostError {
  override readonly code = "INVALID_PARAMS";
}

/** The request is valid, but this version does not support it. */
export class UnsupportedError extends HostError {
  override readonly code = "NOT_SUPPORTED";
}

/** There is nothing of this name. */
export class NotFoundError extends HostError {
  override readonly code = "NOT_FOUND";
}

/** A newer version of this software wrote it: it is sound as far as this version can tell, and must not be guessed at. */
export class NewerFormatError extends HostError {
  override readonly code = "NEWER_FORMAT";
}

/** The abort reason of every cancelled operation. */
export class CancelledError extends HostError {
  override readonly code = "CANCELLED";
}

/** A child process could not be started, died, or did not answer. */
export class ChildProcessError extends HostError {
  override readonly code = "CHILD_PROCESS";
}

/** The operating system refused: a full disk, a missing path. Keeps `errno` ("ENOSPC"). */
export class EnvironmentError extends HostError {
  override readonly code = "ENVIRONMENT";
  readonly errno: string | undefined;

  constructor(message: string, options: HostErrorOptions & { errno?: string | undefined } = {}) {
    super(message, options);
    this.errno = options.errno ?? errnoOf(options.cause);
  }
}

const ERRNO_SENTENCES: Readonly<Record<string, string>> = {
  EACCES: "permission denied",
  EDQUOT: "disk quota exceeded",
  EEXIST: "it already exists",
  EIO: "input/output error",
  ENOENT: "no such file or directory",
  ENOSPC: "no space left on the device",
  ENOTDIR: "a part of the path is not a directory",
  EPERM: "operation not permitted",
  EROFS: "the file system is read-only",
  ESTALE: "the network share lost this file (stale file handle)",
  ETIMEDOUT: "it did not answer in time",
};

const MAX_UNWRAP = 16;

/** The failure that came first: a SuppressedError says that a release failed, too, and has no message. */
export function firstError(error: unknown): unknown {
  let at = error;
  for (let depth = 0; depth < MAX_UNWRAP && at instanceof Error && "suppressed" in at; depth++) at = at.suppressed;
  return at;
}

/** The errno name ("ENOSPC") of a Node system error, also through `cause`; undefined for others. */
export function errnoOf(error: unknown): string | undefined {
  for (let at = firstError(error), depth = 0; at instanceof Error && depth < 8; at = firstError(at.cause), depth++) {
    if (at instanceof EnvironmentError && at.errno !== undefined) return at.errno;
    const code: unknown = (at as NodeJS.ErrnoException).code;
    if (typeof code === "string" && /^E[A-Z0-9]+$/.test(code) && "syscall" in at) return code;
  }
  return undefined;
}

/**
 * Words a system error: `Cannot <act> "<path>": no space left on the device (ENOSPC)`.
 * A `HostError` passes unchanged: the layer that raised it worded it better.
 */
export function environmentError(act: string, path: string, thrown: unknown): HostError {
  const cause = firstError(thrown);
  if (cause instanceof HostError) return cause;
  const errno = errnoOf(cause);
  const state = errno === undefined ? messageOf(cause) : `${ERRNO_SENTENCES[errno] ?? "failed"} (${errno})`;
  return new EnvironmentError(`Cannot ${act} ${JSON.stringify(shortPath(path))}: ${state}`, { cause, errno });
}

/** Text of anything that was thrown. */
export function messageOf(error: unknown): string {
  const first = firstError(error);
  return oneLine(first instanceof Error ? first.message : String(first));
}
