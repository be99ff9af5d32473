// SPDX-License-Identifier: AGPL-3.0-or-later
// One volume of a running backup with mechanism "file-handle": its bytes come from PVE's FUSE file. QEMU itself is
// asked what is dirty and what reads as zero, on the NBD socket next to that file.
import path from "node:path";
import type { CopySource } from "../block/index.ts";
import { type Extent, type SourceExtent, splitAt } from "../block/index.ts";
import type { LogFunction } from "../core/index.ts";
import { CleanupStack, MIB, messageOf, RequestError } from "../core/index.ts";
import type { FileHandleCalls, HandleReference, VmVolume } from "../provider/index.ts";
import { mustBeWhole, mustMatchBitmap, reportedRegions } from "./dirty-regions.ts";
import { FuseFile } from "./fuse-file.ts";
import { DISCARD_MAX_BYTES, NbdSource, type NbdTimeouts } from "./nbd-source.ts";

/**
 * Ranges wait until they are this many bytes or this many, because each call stops the Perl side for a while. The limits
 * are not larger because a server that is merely slow would then be mistaken for one that hangs.
 */
const DEALLOCATE_BATCH_BYTES = 32 * MIB;
const DEALLOCATE_BATCH_RANGES = 64;

interface FileHandleVolume {
  readonly device: string;
  readonly volume: VmVolume;
  readonly handle: HandleReference;
  /** The volume's bitmap has the storage's name. */
  readonly storeid: string;
  readonly calls: FileHandleCalls;
  readonly timeouts: NbdTimeouts;
  readonly log: LogFunction;
}

export class FileHandleSource implements CopySource, AsyncDisposable {
  readonly canDiscard = true;
  readonly sizeBytes: number;
  readonly #device: string;
  readonly #calls: FileHandleCalls;
  readonly #file: FuseFile;
  /** Undefined if zeroes cannot be told from data: then everything is read. */
  readonly #map: NbdSource | undefined;
  readonly #dirtyBytes: number;
  readonly #owned: CleanupStack;
  #freed: Extent[] = [];
  #freedBytes = 0;

  private constructor(
    { device, volume, calls }: FileHandleVolume,
    file: FuseFile,
    map: NbdSource | undefined,
    dirtyBytes: number,
    owned: CleanupStack,
  ) {
    this.sizeBytes = volume.size;
    this.#device = device;
    this.#calls = calls;
    this.#file = file;
    this.#map = map;
    this.#dirtyBytes = dirtyBytes;
    this.#owned = owned;
  }

  /**
   * Opens the file and checks, before anything is read, that PVE's dirty regions are complete.
   *
   * @throws RequestError if the size differs from what PVE said, or the regions from what they must be
   */
  static async open(options: FileHandleVolume, signal: AbortSignal): Promise<FileHandleSource> {
    const { calls, device, handle, timeouts, volume } = options;
    await using stack = new CleanupStack();
    const file = stack.use(await FuseFile.open(device, handle, timeouts.replyTimeoutMs, signal));
    if (file.sizeBytes !== volume.size) {
      throw new RequestError(
        `Cannot back up "${device}": its file handle has ${file.sizeBytes} bytes, PVE said ${volume.size}`,
      );
    }
    const map = await openMap(options, file.path, signal);
    if (map !== undefined) stack.use(map);
    const regions = reportedRegions(device, volume.size, calls, timeouts.replyTimeoutMs, signal);
    let dirtyBytes = volume.size;
    if (volume.bitmapMode === "reuse" && map !== undefined) {
      dirtyBytes = await mustMatchBitmap(device, regions, map.dirtyRanges(signal));
    } else {
      await mustBeWhole(device, volume.size, regions);
    }
    return new FileHandleSource(options, file, map, dirtyBytes, stack.move());
  }

  async dirtyBytes(): Promise<number> {
    return this.#dirtyBytes;
  }

  async *extents(signal: AbortSignal): AsyncGenerator<SourceExtent, void, undefined> {
    if (this.#map !== undefined) yield* this.#map.extents(signal);
    else if (this.sizeBytes > 0) yield { offset: 0, length: this.sizeBytes, zero: false };
  }

  read(offset: number, target: Buffer, signal: AbortSignal): Promise<void> {
    return this.#file.read(offset, target, signal);
  }

  /** Only Perl has the handle that may write. Small ranges wait for others; the last ones are never discarded. */
  async discard(range: Extent, signal: AbortSignal): Promise<void> {
    for (const piece of splitAt(range, DISCARD_MAX_BYTES)) {
      this.#freed.push(piece);
      this.#freedBytes += piece.length;
      if (this.#freedBytes < DEALLOCATE_BATCH_BYTES && this.#freed.length < DEALLOCATE_BATCH_RANGES) continue;
      const ranges = this.#freed;
      this.#freed = [];
      this.#freedBytes = 0;
      // Piece by piece, so that a server that is merely slow is not mistaken for one that hangs.
      await this.#file.watch(() => this.#calls.deallocate(this.#device, ranges, signal), signal);
    }
  }

  /** Closes the file: next, PVE unmounts it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/**
 * What QEMU itself says about the volume. If there is no bitmap to compare, a backup can do without this.
 *
 * @throws RequestError if a bitmap is reused and cannot be read
 */
async function openMap(
  { device, log, storeid, timeouts, volume }: FileHandleVolume,
  filePath: string,
  signal: AbortSignal,
): Promise<NbdSource | undefined> {
  try {
    const nbdPath = socketBeside(filePath, device);
    if (nbdPath === undefined) throw new RequestError(`"${filePath}" does not tell where its NBD socket is`);
    const bitmapName = `snapshot-access:${storeid}`;
    return await NbdSource.open(device, { ...volume, nbdPath, bitmapName }, timeouts, signal);
  } catch (error) {
    signal.throwIfAborted();
    const why = messageOf(error);
    if (volume.bitmapMode === "reuse") {
      const act = `Cannot compare the dirty regions of "${device}" with QEMU's bitmap`;
      throw new RequestError(`${act}: ${why}`, { cause: error });
    }
    log("info", `${device}: all of it is read, zeroes too: QEMU cannot be asked where they are (${why})`);
    return undefined;
  }
}

/** PVE mounts the export of `<socket>` as `<socket>.<device>.<pid>/<device>`. Undefined for any other path. */
export function socketBeside(filePath: string, device: string): string | undefined {
  const folder = path.dirname(filePath);
  const prefix = folder.replace(/\.\d+$/, "");
  const socket = prefix.slice(0, -`.${device}`.length);
  const isAsPveNames = path.basename(filePath) === device && prefix !== folder && prefix === `${socket}.${device}`;
  return isAsPveNames && !socket.endsWith("/") ? socket : undefined;
}
