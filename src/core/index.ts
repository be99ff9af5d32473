// SPDX-License-Identifier: AGPL-3.0-or-later
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
  RequestError,
  UnsupportedError,
} from "./errors.ts";
export type { LogFunction, LogLevel } from "./log.ts";
export { orderedMap } from "./ordered-map.ts";
export { isUuid, oneLine, quote } from "./text.ts";
