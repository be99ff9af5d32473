// SPDX-License-Identifier: AGPL-3.0-or-later
// The block digests of a chain of images: what a base holds, cluster by cluster. A file of digests that is missing,
// damaged or another backup's tells nothing; it never makes a backup fail.
import { CleanupStack, HostError } from "../core/index.ts";
import { BlockDigestFile, ChainDigests } from "../digest/index.ts";
import { FileProblem, type RegularFile } from "../host/index.ts";
import type { OpenChain, RecordedDigests } from "./chain.ts";
import { unreadableFile } from "./image-file.ts";

/** Open until it is disposed. */
export interface ChainContent extends AsyncDisposable {
  readonly digests: ChainDigests;
  /** Of the topmost image; an image on top of it has the same. */
  readonly secret: Buffer;
}

/**
 * @param chain outlives what is returned
 * @param warn called with what is wrong with a file of digests; what it would tell is unknown then
 * @returns undefined if the topmost image has no digests
 */
export async function openChainContent(
  chain: OpenChain,
  warn: (message: string) => void,
): Promise<ChainContent | undefined> {
  await using owned = new CleanupStack();
  const files: (BlockDigestFile | undefined)[] = [];
  for (const recorded of chain.digests) {
    const secret = files[0]?.header.secret;
    const file = await open(recorded, chain.sizeBytes, secret, owned).catch((error: unknown) => {
      if (!(error instanceof HostError)) throw error;
      warn(`${error.message}; what it records is compared with nothing`);
      return undefined;
    });
    files.push(file);
    if (file === undefined) break; // what lies below cannot be told from what this one hides
  }
  const [top] = files;
  if (top === undefined) return undefined;
  const said = new Set<number>();
  const onDamage = (index: number, reason: string): void => {
    if (said.has(index)) return;
    said.add(index);
    const { folder, name } = chain.digests[index] as RecordedDigests;
    warn(`Cannot use "${folder.pathOf(name)}": ${reason}; what it records is compared with nothing`);
  };
  const stack = owned.move();
  return {
    digests: new ChainDigests(files, onDamage),
    secret: top.header.secret,
    [Symbol.asyncDispose]: () => stack[Symbol.asyncDispose](),
  };
}

/** @throws PointDamagedError, EnvironmentError */
async function open(
  recorded: RecordedDigests | undefined,
  diskBytes: number,
  secret: Buffer | undefined,
  owned: CleanupStack,
): Promise<BlockDigestFile | undefined> {
  if (recorded === undefined) return undefined;
  const { folder, name, sizeBytes, uuid } = recorded;
  try {
    const file: RegularFile = owned.use(await folder.openFile(name));
    if (file.fileBytes !== sizeBytes) {
      throw new FileProblem(`it has ${file.fileBytes} bytes, expected ${sizeBytes}`);
    }
    const found = await BlockDigestFile.open(file);
    const { header } = found;
    if (header.uuid !== uuid) throw new FileProblem(`it belongs to another backup (${header.uuid}), expected ${uuid}`);
    if (header.diskBytes !== diskBytes) throw new FileProblem("it is of a disk of another size");
    if (secret !== undefined && !secret.equals(header.secret)) throw new FileProblem("it is of another chain");
    return found;
  } catch (error) {
    throw unreadableFile(folder.pathOf(name), error);
  }
}
