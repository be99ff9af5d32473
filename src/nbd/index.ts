// SPDX-License-Identifier: AGPL-3.0-or-later
// An NBD client, a library in its own right (docs/nbd-client.md): handshake, structured replies, block status,
// many commands in flight. The server is not trusted. It knows nothing of Proxmox VE or of backups: which export
// and which context to ask for is for source to decide.
export { NbdConnection } from "./connection.ts";
export { AllocationFlag, BASE_ALLOCATION, DirtyFlag } from "./constants.ts";
export { NbdConnectionError, NbdServerError } from "./errors.ts";
