// SPDX-License-Identifier: AGPL-3.0-or-later
// The three ways an NBD conversation fails: the server breaks the protocol, the server refuses, the connection is lost.

import { HostError, type HostErrorOptions } from "../core/index.ts";

const SERVER_BUG_HINT = "This is likely to be a bug in the NBD server";

/** The server sent something that the protocol does not allow. Never worth a retry. */
export class NbdProtocolError extends HostError {
  override readonly code = "SOURCE";

  constructor(message: string, options: HostErrorOptions = {}) {
    super(message, { hint: SERVER_BUG_HINT, ...options });
  }
}

/** The server understood and refused. The connection stays usable, except while it is being opened. */
export class NbdServerError extends HostError {
  override readonly code = "SOURCE";
  /**
   * Name of the refusal: a POSIX name for commands ("EINVAL", "ENOSPC"; "ERRNO_<n>" for a number
   * that the protocol does not define), the spec's name for options ("NBD_REP_ERR_UNKNOWN").
   */
  readonly errno: string;

  constructor(message: string, options: HostErrorOptions & { errno: string }) {
    super(message, options);
    this.errno = options.errno;
  }
}

/** There is no connection, it was lost, or the server hangs. Every pending command fails with the same error. */
export class NbdConnectionError extends HostError {
  override readonly code = "SOURCE";
  /** Name of the system error that caused this, e.g. "ECONNREFUSED"; also "ECONNRESET" if the server hung up. */
  readonly errno: string | undefined;

  constructor(message: string, options: HostErrorOptions & { errno?: string | undefined } = {}) {
    super(message, options);
    this.errno = options.errno;
  }
}
