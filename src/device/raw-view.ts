// SPDX-License-Identifier: AGPL-3.0-or-later
// The content of a backing chain as one raw, read-only file, which is what PVE's restore can read.
// qemu-storage-daemon's FUSE export where this QEMU has it, else nbdfuse before a qemu-nbd.
import { stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { ChildProcessError, CleanupStack, RequestError } from "../core/index.ts";
import { MAX_CHAIN_LENGTH, relateChain } from "./chain-node.ts";
import { hasFuseExport, startFuseExport } from "./fuse-export.ts";
import { mountsBelow } from "./mounts.ts";
import { startNbdfuse } from "./nbdfuse.ts";
import type { ToolProcess } from "./tool-process.ts";
import { ViewFolder } from "./view-folder.ts";

const READY_TIMEOUT_MS = 30_000;
const POLL_MS = 10;
const SECTOR_BYTES = 512;
const DEVICE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

export type RawViewMechanism = "fuse-export" | "nbdfuse";

/** A raw file that exists until it is disposed. */
export interface RawView extends AsyncDisposable {
  readonly path: string;
  readonly sizeBytes: number;
}

export interface RawViewOptions {
  /** Absolute paths of qcow2 files, top first. Their headers' backing names are not looked at. */
  readonly chain: readonly string[];
  /** Size the file must have: the guest disk's, a multiple of 512. */
  readonly sizeBytes: number;
  /** Folder for mounts, on a local file system; made if missing. */
  readonly runDir: string;
  /** Device name; the file is called `<name>.raw`. */
  readonly name: string;
  /** Default: whatever this machine has. */
  readonly mechanism?: RawViewMechanism;
  readonly signal: AbortSignal;
}

/**
 * Offers the content of `chain` as a raw file. Nothing is left behind on failure.
 *
 * @throws RequestError if the options are wrong in themselves
 * @throws ChildProcessError if the images cannot be opened, have another size, or nothing answers in time
 * @throws EnvironmentError if a folder of the chain is missing, or `runDir` cannot be written
 * @throws the abort reason of `signal`
 */
export async function openRawView(options: RawViewOptions): Promise<RawView> {
  const { name, signal, sizeBytes } = options;
  checkOptions(options);
  signal.throwIfAborted();
  const chain = await relateChain(options.chain);
  const mechanism = options.mechanism ?? ((await hasFuseExport()) ? "fuse-export" : "nbdfuse");
  await using stack = new CleanupStack();
  const folder = stack.use(await ViewFolder.create(options.runDir));
  const file = path.join(folder.path, `${name}.raw`);
  await writeFile(file, "", { mode: 0o600, flag: "wx" }); // what the mount covers
  const start = mechanism === "fuse-export" ? startFuseExport : startNbdfuse;
  const servers = await start({ chain, file, folder, stack, signal });
  await waitForFile(file, servers, options);
  const owned = stack.move();
  return { path: file, sizeBytes, [Symbol.asyncDispose]: () => owned[Symbol.asyncDispose]() };
}

function checkOptions({ chain, name, sizeBytes }: RawViewOptions): void {
  const act = `Cannot offer ${JSON.stringify(name)} as a raw file`;
  if (!DEVICE_NAME.test(name)) throw new RequestError(`${act}: this is no device name`);
  if (chain.length === 0) throw new RequestError(`${act}: no image is given`);
  if (chain.length > MAX_CHAIN_LENGTH) {
    throw new RequestError(`${act}: its chain has ${chain.length} images, at most ${MAX_CHAIN_LENGTH} can be opened`);
  }
  const odd = chain.find((image) => !path.isAbsolute(image) || image.includes("\0"));
  if (odd !== undefined) throw new RequestError(`${act}: ${JSON.stringify(odd)} is no absolute path`);
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes <= 0 || sizeBytes % SECTOR_BYTES !== 0) {
    throw new RequestError(`${act}: its size is ${sizeBytes} bytes, a multiple of ${SECTOR_BYTES} is needed`);
  }
}

/** Waits until the mount is there and its file answers with the wanted size. */
async function waitForFile(file: string, servers: readonly ToolProcess[], options: RawViewOptions): Promise<void> {
  const act = `Cannot offer ${JSON.stringify(options.name)} as a raw file`;
  const deadline = performance.now() + READY_TIMEOUT_MS;
  let sizeBytes: number | undefined;
  // One stat() for the whole wait: each would hold a thread while the server does not answer.
  let answer: Promise<void> | undefined;
  while (sizeBytes === undefined) {
    options.signal.throwIfAborted();
    const gone = servers.find((server) => server.hasExited);
    if (gone !== undefined) throw new ChildProcessError(`${act}: ${gone.name} ${gone.describeExit()}`);
    if (performance.now() > deadline) {
      throw new ChildProcessError(`${act}: no answer within ${READY_TIMEOUT_MS / 1000} s`);
    }
    if (answer === undefined && (await mountsBelow(file)).length > 0) {
      answer = stat(file).then(
        ({ size }) => {
          sizeBytes = size;
        },
        () => {
          answer = undefined; // asked too early; the server is watched above
        },
      );
    }
    await (answer === undefined ? sleep(POLL_MS) : Promise.race([answer, sleep(POLL_MS)]));
  }
  if (sizeBytes !== options.sizeBytes) {
    throw new ChildProcessError(`${act}: the image holds ${sizeBytes} bytes, ${options.sizeBytes} are recorded`);
  }
}
