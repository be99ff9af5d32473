// SPDX-License-Identifier: AGPL-3.0-or-later
// The one table from error to exit status. docs: pve-backup-host(1), EXIT STATUS.
import { type ErrorCode, firstError, HostError } from "../core/index.ts";

export const ExitCode = { Ok: 0, Failed: 1, Usage: 2, Damaged: 3, NotFound: 4, Interrupted: 130 } as const;
export type ExitCode = (typeof ExitCode)[keyof typeof ExitCode];

const BY_CODE: Partial<Record<ErrorCode, ExitCode>> = {
  INVALID_PARAMS: ExitCode.Usage,
  DAMAGED: ExitCode.Damaged,
  NOT_FOUND: ExitCode.NotFound,
  CANCELLED: ExitCode.Interrupted,
};

export function exitCodeOf(error: unknown): ExitCode {
  const first = firstError(error);
  return (first instanceof HostError ? BY_CODE[first.code] : undefined) ?? ExitCode.Failed;
}
