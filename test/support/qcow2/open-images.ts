// SPDX-License-Identifier: AGPL-3.0-or-later
// The qcow2 library on the files of a test, by path: opened for the call, or until the result is disposed.
import type { FileHandle } from "node:fs/promises";
import { open, rm } from "node:fs/promises";
import { CleanupStack } from "../../../src/core/index.ts";
import { openRawView as openView, type RawView } from "../../../src/device/index.ts";
import type { RawViewOptions } from "../../../src/device/view-options.ts";
import { type DigestAlgorithm, mustCreateDigester } from "../../../src/digest/digest.ts";
import { type Digest, digestFile, verifyFile } from "../../../src/digest/index.ts";
import { type NewFile, openRegularFile, type RegularFile } from "../../../src/host/index.ts";
import { type CheckOptions, checkQcow2 as checkFile } from "../../../src/qcow2/check.ts";
import type { CheckReport } from "../../../src/qcow2/check-report.ts";
import { DIGEST_ORDER } from "../../../src/qcow2/digest-order.ts";
import * as qcow2 from "../../../src/qcow2/index.ts";
import { readQcow2Header as readHeader } from "../../../src/qcow2/read-header.ts";

/** Opens images; disposing the result closes them. */
export async function openImages(paths: readonly string[]): Promise<{ files: RegularFile[] } & AsyncDisposable> {
  await using stack = new CleanupStack();
  const files: RegularFile[] = [];
  for (const path of paths) files.push(stack.use(await openRegularFile(path)));
  const owned = stack.move();
  return { files, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

export async function openChain(
  paths: readonly string[],
  signal: AbortSignal,
): Promise<qcow2.Qcow2Chain & AsyncDisposable> {
  await using stack = new CleanupStack();
  const { files } = stack.use(await openImages(paths));
  const chain = await qcow2.Qcow2Chain.over(files, signal);
  const owned = stack.move();
  return Object.assign(chain, { [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() });
}

export async function checkQcow2(path: string, options: CheckOptions): Promise<CheckReport> {
  await using file = await openRegularFile(path);
  return await checkFile(file, options);
}

export async function readQcow2Header(path: string): Promise<qcow2.Qcow2Header> {
  await using file = await openRegularFile(path);
  return await readHeader(file);
}

export async function digestQcow2File(path: string, algorithm: DigestAlgorithm, signal: AbortSignal): Promise<Digest> {
  await using file = await openRegularFile(path);
  return await digestFile(file, mustCreateDigester(algorithm, path), signal, DIGEST_ORDER);
}

export async function verifyQcow2File(path: string, expected: Digest, signal: AbortSignal): Promise<boolean> {
  await using file = await openRegularFile(path);
  return await verifyFile(file, expected, signal, DIGEST_ORDER);
}

export function newFileAt(path: string): NewFile {
  return {
    path,
    create: async (): Promise<FileHandle> => await open(path, "wx+", 0o600),
    remove: async () => await rm(path, { force: true }),
  };
}

/** openRawView() on images by path: the view closes them. */
export async function openRawView(
  options: Omit<RawViewOptions, "chain"> & { readonly chain: readonly string[] },
): Promise<RawView> {
  await using stack = new CleanupStack();
  const { files } = stack.use(await openImages(options.chain));
  const view = stack.use(await openView({ ...options, chain: files }));
  const owned = stack.move();
  return {
    path: view.path,
    sizeBytes: view.sizeBytes,
    findTrouble: () => view.findTrouble(),
    [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose](),
  };
}
