// SPDX-License-Identifier: AGPL-3.0-or-later
// The base of everything else: errors with stable codes, bytes and text for messages, cleanup in reverse order,
// bounded concurrency. It only computes: no files, no sockets, no processes. Code that touches the operating system
// is in host, and code that knows Proxmox VE's names is in pve.
export { alignDown, alignUp, formatBytes, GIB, KIB, MIB, toSafeNumber } from "./bytes.ts";
export { CleanupStack } from "./cleanup-stack.ts";
export {
  CancelledError,
  ChildProcessError,
  EnvironmentError,
  type ErrorCode,
  environmentError,
  errnoOf,
  firstError,
  HostError,
  type HostErrorOptions,
  messageOf,
  NewerFormatError,
  NotFoundError,
  RequestError,
  UnsupportedError,
} from "./errors.ts";
export type { LogFunction, LogLevel } from "./log.ts";
export { orderedMap } from "./ordered-map.ts";
export { isUuid, oneLine, quote, shortenMiddle, shortPath, toBytes, toText } from "./text.ts";
