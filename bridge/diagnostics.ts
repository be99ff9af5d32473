// SPDX-License-Identifier: AGPL-3.0-or-later
// Node's own diagnostics, as JSON lines on stderr; the shim passes them on as warnings.

/** pino is evaluated only when there is something to say: that is almost never. */
export async function reportInternalError(error: unknown, method: string): Promise<void> {
  const { pino } = await import("pino");
  const destination = pino.destination({ fd: 2, sync: true });
  pino({ name: "pve-backup-host" }, destination).error({ err: error, method }, "internal error");
}
