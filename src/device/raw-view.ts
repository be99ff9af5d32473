// SPDX-License-Identifier: AGPL-3.0-or-later
// The content of a backing chain as one raw, read-only file or block device, because that is what PVE's restore reads.
import { firstError, HostError, messageOf, RequestError } from "../core/index.ts";
import { MAX_OPEN_IMAGES } from "./chain-node.ts";
import { openFuseView } from "./fuse-view.ts";
import { hasNbdModule, nbdHost } from "./nbd-host.ts";
import { openNbdView } from "./nbd-view.ts";
import type { RawView, RawViewOptions } from "./view-options.ts";

const SECTOR_BYTES = 512;
const DEVICE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/**
 * Offers the content of `chain` as a raw file or block device. A failure leaves nothing behind.
 *
 * @throws RequestError if the options are invalid in themselves
 * @throws ChildProcessError if the images cannot be opened or have the wrong size, or nothing answers in time
 * @throws EnvironmentError if a directory of the chain is missing, or `runDir` cannot be written; for "nbd" also if no
 *   /dev/nbdX is free
 * @throws the abort reason of `signal`
 */
export async function openRawView(options: RawViewOptions): Promise<RawView> {
  const { host = nbdHost(), mechanism = "auto", signal, warn } = options;
  checkOptions(options);
  signal.throwIfAborted();
  if (mechanism === "nbd") return await openNbdView({ ...options, host });
  if (mechanism === "auto" && (await hasNbdModule(host))) {
    try {
      return await openNbdView({ ...options, host });
    } catch (error) {
      signal.throwIfAborted();
      if (!(firstError(error) instanceof HostError)) throw error;
      warn?.(`${messageOf(error)}; a FUSE file is used instead`);
    }
  }
  return await openFuseView(options);
}

function checkOptions({ chain, name, sizeBytes }: RawViewOptions): void {
  const act = `Cannot offer ${JSON.stringify(name)} as a raw file`;
  if (!DEVICE_NAME.test(name)) throw new RequestError(`${act}: this is not a device name`);
  if (chain.length === 0) throw new RequestError(`${act}: no image is given`);
  if (chain.length > MAX_OPEN_IMAGES) {
    throw new RequestError(`${act}: its chain has ${chain.length} images, at most ${MAX_OPEN_IMAGES} can be opened`);
  }
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes <= 0 || sizeBytes % SECTOR_BYTES !== 0) {
    throw new RequestError(`${act}: its size is ${sizeBytes} bytes, expected a multiple of ${SECTOR_BYTES}`);
  }
}
