// SPDX-License-Identifier: AGPL-3.0-or-later
// An NBD client, a library in its own right (docs/nbd-client.md): handshake, structured replies, block status, many
// commands in flight. The client does not trust the server. It knows nothing about Proxmox VE or backups: source
// decides which export and which context to ask for.
export { NbdConnection } from "./connection.ts";
export { AllocationFlag, BASE_ALLOCATION, DirtyFlag } from "./constants.ts";
export { NbdConnectionError, NbdServerError } from "./errors.ts";
