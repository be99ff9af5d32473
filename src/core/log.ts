// SPDX-License-Identifier: AGPL-3.0-or-later

export type LogLevel = "info" | "warn" | "err";
/** Writes one line to the PVE task log. */
export type LogFunction = (level: LogLevel, message: string) => void;
