// SPDX-License-Identifier: AGPL-3.0-or-later
// What the two processes of a container's backup say to each other at its end.
import type { ArchiveSummary } from "../../archive/index.ts";
import { HostError, MIB, messageOf, RequestError } from "../../core/index.ts";
import type { HandoffMessage } from "./container-handoff.ts";

const MAX_GUEST_CONFIG_BYTES = 4 * MIB;

/** The archive is written: commit it. */
export interface CommitMessage {
  readonly summary: ArchiveSummary;
  readonly guestConfig: Buffer;
}

export function formatCommit({ summary, guestConfig }: CommitMessage): HandoffMessage {
  return { commit: { ...summary, "guest-config": guestConfig.toString("base64") } };
}

/**
 * Inverse of formatCommit(). Everything in it comes from the process in the user namespace.
 *
 * @throws RequestError saying what is wrong with it
 */
export function parseCommit(message: HandoffMessage): CommitMessage {
  const commit = message.commit as Record<string, unknown> | undefined | null;
  if (typeof commit !== "object" || commit === null) throw refused('it has no "commit"');
  const config = commit["guest-config"];
  if (typeof config !== "string") throw refused("it has no guest config");
  const guestConfig = Buffer.from(config, "base64");
  if (guestConfig.length > MAX_GUEST_CONFIG_BYTES) throw refused("its guest config is too long");
  return {
    summary: { files: count(commit, "files"), bytes: count(commit, "bytes"), warnings: count(commit, "warnings") },
    guestConfig,
  };
}

function count(commit: Record<string, unknown>, key: string): number {
  const value = commit[key];
  if (typeof value !== "number" || !Number.isSafeInteger(value) || value < 0) throw refused(`"${key}" is not a count`);
  return value;
}

function refused(why: string): RequestError {
  return new RequestError(`Cannot use the message of the container's archiver: ${why}`);
}

export function errorMessage(error: unknown): HandoffMessage {
  const hint = error instanceof HostError ? error.hint : undefined;
  return { error: { message: messageOf(error), ...(hint === undefined ? {} : { hint }) } };
}
