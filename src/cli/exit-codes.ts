// SPDX-License-Identifier: AGPL-3.0-or-later
// The one table from error to exit status. docs: pve-backup-host(1), EXIT STATUS.
import { type ErrorCode, firstError, HostError } from "../core/index.ts";
import { OutputClosedError } from "./output.ts";

export const ExitCode = {
  Ok: 0,
  Failed: 1,
  Usage: 2,
  /** Only what was read and found wrong. */
  Damaged: 3,
  NotFound: 4,
  /** Not known to be damaged: it could not be read, or not by this version, or not now. */
  Unreadable: 5,
  Interrupted: 130,
  /** What a shell reports for a program that SIGPIPE ended; Node ignores the signal. */
  OutputClosed: 141,
} as const;
export type ExitCode = (typeof ExitCode)[keyof typeof ExitCode];

/** For --help. */
export const EXIT_STATUS =
  "0 success, 1 failed, 2 wrong command line, 3 damaged, 4 no such backup, 5 could not be read, " +
  "130 interrupted, 141 output closed";

const BY_CODE: Partial<Record<ErrorCode, ExitCode>> = {
  INVALID_PARAMS: ExitCode.Usage,
  DAMAGED: ExitCode.Damaged,
  NOT_FOUND: ExitCode.NotFound,
  UNAVAILABLE: ExitCode.Unreadable,
  ENVIRONMENT: ExitCode.Unreadable,
  NEWER_FORMAT: ExitCode.Unreadable,
  LOCKED: ExitCode.Unreadable,
  CANCELLED: ExitCode.Interrupted,
};

export function exitCodeOf(error: unknown): ExitCode {
  const first = firstError(error);
  if (first instanceof OutputClosedError) return ExitCode.OutputClosed;
  return (first instanceof HostError ? BY_CODE[first.code] : undefined) ?? ExitCode.Failed;
}
