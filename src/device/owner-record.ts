// SPDX-License-Identifier: AGPL-3.0-or-later
// owner.json in the directory of a raw view: which process owns it and which processes serve it, for a later sweep.
import { readFile, rename, writeFile } from "node:fs/promises";
import path from "node:path";
import { environmentError } from "../core/index.ts";
import type { ProcessIdentity } from "../host/index.ts";

const OWNER_FILE = "owner.json";
const MAX_CHILDREN = 8;

interface OwnerRecord {
  readonly owner: ProcessIdentity;
  readonly children: readonly ProcessIdentity[];
  /** X of the /dev/nbdX that the children serve, or are about to. */
  readonly nbdNode?: number;
}

/** @throws EnvironmentError */
export async function writeOwnerRecord(folder: string, record: OwnerRecord): Promise<void> {
  const target = path.join(folder, OWNER_FILE);
  try {
    await writeFile(`${target}.new`, `${JSON.stringify(record)}\n`, { mode: 0o600 });
    await rename(`${target}.new`, target);
  } catch (error) {
    throw environmentError("write", target, error);
  }
}

/** undefined if the record is missing or cannot be understood. */
export async function readOwnerRecord(folder: string): Promise<OwnerRecord | undefined> {
  let value: unknown;
  try {
    value = JSON.parse(await readFile(path.join(folder, OWNER_FILE), "utf8"));
  } catch {
    return undefined;
  }
  if (!isRecord(value) || !isIdentity(value.owner)) return undefined;
  const children = Array.isArray(value.children) ? value.children.slice(0, MAX_CHILDREN).filter(isIdentity) : [];
  const record = { owner: value.owner, children };
  return isNodeIndex(value.nbdNode) ? { ...record, nbdNode: value.nbdNode } : record;
}

function isIdentity(value: unknown): value is ProcessIdentity {
  return (
    isRecord(value) &&
    typeof value.bootId === "string" &&
    typeof value.startTime === "string" &&
    Number.isSafeInteger(value.pid) &&
    Number(value.pid) > 1
  );
}

function isNodeIndex(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}
