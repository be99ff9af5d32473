// SPDX-License-Identifier: AGPL-3.0-or-later
// An NBD client and a read-only NBD server, a library in its own right (docs/nbd-client.md): handshake, structured replies,
// block status, many commands in flight. Neither trusts its peer. It knows nothing about Proxmox VE or backups: source
// decides which export and which context to ask for, and what the server serves is an NbdExport.
export { NbdConnection } from "./connection.ts";
export { AllocationFlag, BASE_ALLOCATION, DirtyFlag } from "./constants.ts";
export { NbdConnectionError, NbdServerError } from "./errors.ts";
export { NbdServer } from "./server.ts";
export type { NbdExport, ZeroExtent } from "./server-export.ts";
