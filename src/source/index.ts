// SPDX-License-Identifier: AGPL-3.0-or-later
export { FileHandleSource } from "./file-handle-source.ts";
export { NbdSource, type NbdTimeouts } from "./nbd-source.ts";
export { explainLoss } from "./source-failure.ts";
