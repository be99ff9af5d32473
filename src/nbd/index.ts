// SPDX-License-Identifier: AGPL-3.0-or-later
export { NbdConnection } from "./connection.ts";
export { AllocationFlag, BASE_ALLOCATION, DirtyFlag } from "./constants.ts";
export { NbdConnectionError, NbdServerError } from "./errors.ts";
