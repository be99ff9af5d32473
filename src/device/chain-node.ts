// SPDX-License-Identifier: AGPL-3.0-or-later
// A backing chain as explicit QEMU nodes. QEMU then opens these files and no others: it does not follow names in the
// headers, and parses no file name as a protocol or an option.
import { mkdir, symlink } from "node:fs/promises";
import path from "node:path";
import { environmentError, errnoOf, UnsupportedError } from "../core/index.ts";
import { type ChildOptions, FIRST_LENT_FD, type RegularFile } from "../host/index.ts";

/**
 * The most images that QEMU can be asked to open at once: each costs an open file and a share of the command line. The
 * store decides how long a chain may grow, and its limit is far lower.
 */
export const MAX_OPEN_IMAGES = 2_000;

/**
 * Linux takes 128 KiB as one argument, QEMU's JSON parser 1024 levels; an image needs one level and at least 100 bytes.
 * The longest chain that the store allows takes half of this with the longest names.
 */
const MAX_NESTED_BYTES = 100_000;

/** A node of QEMU's block layer, in QMP's JSON form. */
interface BlockdevNode {
  readonly driver: string;
  readonly "node-name"?: string;
  readonly "read-only": true;
  readonly filename?: string;
  readonly file?: string | BlockdevNode;
  readonly backing?: string | null | BlockdevNode;
}

/** Name of the node that carries the content of the whole chain. */
export const TOP_NODE = "image-0";

/** A chain as names relative to a directory, which must be QEMU's working directory. */
export interface LentChain {
  readonly cwd: string;
  readonly names: readonly string[];
  /** Descriptors for QEMU to inherit, in this order: the names lead to them, never to a file's name. */
  readonly fds: readonly number[];
}

/**
 * Names open images for a QEMU that inherits their descriptors. Below `folder`, which only root can use, a link for
 * each image leads to the descriptor that QEMU has of it, so it does not matter what others do to the images' own
 * names meanwhile.
 *
 * The links lie as the headers of our images name their backing files ("../qemu-1700000000/drive-scsi0.qcow2"). Where
 * node and header agree, QEMU uses the file's name as the node's; otherwise it composes a JSON name for the whole rest
 * of the chain at every step, and opening 300 images takes 15 s instead of 0.2 s.
 *
 * @throws EnvironmentError if `folder` cannot be written
 */
export async function lendChain(chain: readonly RegularFile[], folder: string): Promise<LentChain> {
  const root = path.join(folder, "chain");
  let cwd: string | undefined;
  const names: string[] = [];
  for (const [index, image] of chain.entries()) {
    const target = `/proc/self/fd/${FIRST_LENT_FD + index}`; // of the process that follows it
    try {
      const link = await linkImage(root, image.path, target, index);
      cwd ??= path.dirname(link);
      names.push(path.relative(cwd, link));
    } catch (cause) {
      throw environmentError("prepare a folder below", root, cause);
    }
  }
  return { cwd: cwd ?? "/", names, fds: chain.map(({ handle }) => handle.fd) };
}

async function linkImage(root: string, image: string, target: string, index: number): Promise<string> {
  const file = path.basename(image);
  const usual = path.join(root, path.basename(path.dirname(image)));
  await mkdir(usual, { recursive: true, mode: 0o700 });
  try {
    await symlink(target, path.join(usual, file));
    return path.join(usual, file);
  } catch (error) {
    if (errnoOf(error) !== "EEXIST") throw error;
  }
  const own = path.join(root, `image-${index}`); // two directories of the same name
  await mkdir(own, { mode: 0o700 });
  await symlink(target, path.join(own, file));
  return path.join(own, file);
}

/** How to start a server of `chain`. When orphaned, it has time to release what it has mounted or connected. */
export function serverOptions({ cwd, fds }: LentChain): ChildOptions {
  return { cwd, stdio: ["ignore", "ignore", ...fds], orphanedBy: "TERM" };
}

/**
 * The chain as a list for --blockdev, in the order QEMU must open them: the base first.
 *
 * @param chain names of qcow2 files, top first, at least one
 */
export function planChainNodes(chain: readonly string[]): BlockdevNode[] {
  const nodes: BlockdevNode[] = [];
  for (let index = chain.length - 1; index >= 0; index--) {
    const isBase = index === chain.length - 1;
    nodes.push({ driver: "file", "node-name": `file-${index}`, filename: chain[index] as string, "read-only": true });
    nodes.push({
      driver: "qcow2",
      "node-name": `image-${index}`,
      file: `file-${index}`,
      backing: isBase ? null : `image-${index + 1}`,
      "read-only": true,
    });
  }
  return nodes;
}

/**
 * The same chain as one nested node, for tools that take a single "json:" file name.
 *
 * @throws UnsupportedError if the name would be longer than a program's argument can be, or nested deeper than QEMU
 *   reads; that happens beyond some hundred images
 */
export function nestedChainName(chain: readonly string[]): string {
  const name = `json:${JSON.stringify(planNestedChain(chain))}`;
  if (Buffer.byteLength(name) <= MAX_NESTED_BYTES) return name;
  throw new UnsupportedError(
    `Cannot open ${JSON.stringify(chain[0])} with qemu-nbd: its chain of ${chain.length} images is too long for that`,
  );
}

function planNestedChain(chain: readonly string[]): BlockdevNode {
  let node: BlockdevNode | null = null;
  for (let index = chain.length - 1; index >= 0; index--) {
    const file: BlockdevNode = { driver: "file", filename: chain[index] as string, "read-only": true };
    node = { driver: "qcow2", file, backing: node, "read-only": true };
  }
  if (node === null) throw new TypeError("planNestedChain() needs at least one image");
  return node;
}
