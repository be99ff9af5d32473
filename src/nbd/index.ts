// SPDX-License-Identifier: AGPL-3.0-or-later
export type { NbdAddress } from "./address.ts";
export { describeAddress } from "./address.ts";
export { NbdConnection, type NbdOpenOptions } from "./connection.ts";
export { AllocationFlag, BASE_ALLOCATION, DirtyFlag } from "./constants.ts";
export { NbdConnectionError, NbdProtocolError, NbdServerError } from "./errors.ts";
export { type ListMetaContextsOptions, listMetaContexts, listNbdExports, type NbdExportEntry } from "./listing.ts";
export type { BlockSize } from "./option-wire.ts";
export type { SessionOptions } from "./session.ts";
export { formatNbdUri, type NbdTarget, parseNbdUri } from "./uri.ts";
export type { BlockStatusExtent } from "./wire.ts";
