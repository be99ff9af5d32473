// SPDX-License-Identifier: AGPL-3.0-or-later
// A raw disk behind an NBD export with a bitmap of any granularity and nothing in between: data outside the dirty
// ranges can be read, so a reader that should not read it gives itself away.
import { mkdir, open, writeFile } from "node:fs/promises";
import path from "node:path";
import { GuestDisk } from "../../../fixtures/lab/guest-disk.ts";
import { StorageDaemon } from "../../../fixtures/lab/storage-daemon.ts";
import type { VmVolume } from "../../../src/provider/index.ts";

const NODE = "bare";
const BITMAP = "snapshot-access:bk";

export class BareDisk implements AsyncDisposable {
  readonly device: string;
  readonly file: string;
  readonly sizeBytes: number;
  readonly #daemon: StorageDaemon;

  private constructor(device: string, file: string, sizeBytes: number, daemon: StorageDaemon) {
    this.device = device;
    this.file = file;
    this.sizeBytes = sizeBytes;
    this.#daemon = daemon;
  }

  static async start(dir: string, device: string, content: Buffer): Promise<BareDisk> {
    await mkdir(dir, { recursive: true });
    const file = path.join(dir, "bare.raw");
    await writeFile(file, content);
    const daemon = await StorageDaemon.start(dir);
    const options = { driver: "raw", "node-name": NODE, discard: "unmap", file: { driver: "file", filename: file } };
    await daemon.qmp.execute("blockdev-add", options);
    await daemon.addExport(device, NODE);
    return new BareDisk(device, file, content.length, daemon);
  }

  get pid(): number {
    return this.#daemon.pid;
  }

  /** From now on writes through write() are recorded. */
  async startBitmap(granularityBytes: number): Promise<void> {
    const bitmap = { node: NODE, name: BITMAP, granularity: granularityBytes };
    await this.#daemon.qmp.execute("block-dirty-bitmap-add", bitmap);
  }

  async write(offset: number, bytes: Buffer): Promise<void> {
    const disk = await GuestDisk.connect(this.#daemon.nbdSocket, this.device);
    await disk.write(offset, bytes);
    disk.close();
  }

  /** Changes the disk without QEMU's knowledge: the change reaches no bitmap. */
  async tamper(offset: number, bytes: Buffer): Promise<void> {
    await using handle = await open(this.file, "r+");
    await handle.write(bytes, 0, bytes.length, offset);
  }

  /** Freezes the bitmap and offers it with the export. @returns the volume as passed to `backup_vm` */
  async offerBitmap(): Promise<VmVolume> {
    const bitmap = { node: NODE, name: BITMAP };
    await this.#daemon.qmp.execute("block-dirty-bitmap-disable", bitmap);
    await this.#daemon.removeExport(this.device);
    await this.#daemon.addExport(this.device, NODE, bitmap);
    return { ...this.volume("reuse"), bitmapName: BITMAP };
  }

  volume(bitmapMode: VmVolume["bitmapMode"]): VmVolume {
    return { size: this.sizeBytes, bitmapMode, bitmapName: undefined, nbdPath: this.#daemon.nbdSocket };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#daemon[Symbol.asyncDispose]();
  }
}
