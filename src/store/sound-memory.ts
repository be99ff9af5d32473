// SPDX-License-Identifier: AGPL-3.0-or-later
// Remembers which images of a guest had sound tables when they were last read, by identity, size and times. A chain
// is checked all the way down before a backup builds on it; with this record, an image that has not changed since
// costs no read. The record is on the node, out of reach of any writer of the share; without it everything is read
// again.
import { mkdir } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { messageOf } from "../core/index.ts";
import { type FileStamp, FOLDER_MODE, Folder, formatStamp, readRegularFile } from "../host/index.ts";
import { checkVmid } from "../pve/index.ts";
import type { StoreContext } from "./context.ts";
import { checkFormat, Fields, formatJson, parseJson } from "./format/json.ts";

const SOUND_FORMAT = "pve-backup-host-sound-images";
const SOUND_VERSION = 1;
const MAX_SOUND_BYTES = 4 * 1024 * 1024;
/** 64 disks on chains of 256. */
const MAX_IMAGES = 16_384;
const CACHE_FOLDER = "var/cache/pve-backup-host";

export class SoundMemory {
  readonly vmid: number;
  readonly #context: StoreContext;
  readonly #path: string;
  readonly #before: ReadonlySet<string>;
  readonly #now = new Set<string>();
  #isNew = false;

  private constructor(context: StoreContext, vmid: number, path: string, before: ReadonlySet<string>) {
    this.vmid = vmid;
    this.#context = context;
    this.#path = path;
    this.#before = before;
  }

  /** A record that is missing or cannot be used counts as empty. */
  static async load(context: StoreContext, vmid: number): Promise<SoundMemory> {
    const path = join(context.root || "/", CACHE_FOLDER, context.storeid, `${checkVmid(vmid)}.json`);
    return new SoundMemory(context, vmid, path, await readStamps(path).catch(() => new Set<string>()));
  }

  /** True if the tables of exactly this state of a file were read and found sound. */
  has(stamp: FileStamp): boolean {
    const text = formatStamp(stamp);
    const isKnown = this.#before.has(text) || this.#now.has(text);
    if (isKnown) this.#now.add(text);
    return isKnown;
  }

  add(stamp: FileStamp): void {
    this.#now.add(formatStamp(stamp));
    this.#isNew = true;
  }

  /** Keeps what was asked for or added; a failure only costs the next backup some reads. */
  async save(): Promise<void> {
    if (!this.#isNew) return;
    try {
      await mkdir(dirname(this.#path), { recursive: true, mode: FOLDER_MODE });
      await using folder = await Folder.open(dirname(this.#path));
      const images = [...this.#now].slice(-MAX_IMAGES);
      const bytes = formatJson({ format: SOUND_FORMAT, version: SOUND_VERSION, images });
      await this.#context.io.replaceFile(folder, basename(this.#path), bytes);
    } catch (error) {
      this.#context.warn(
        `Cannot remember which images are sound: ${messageOf(error)}; the next backup reads them again`,
      );
    }
  }
}

async function readStamps(path: string): Promise<Set<string>> {
  const fields = new Fields(parseJson(await readRegularFile(path, MAX_SOUND_BYTES)));
  checkFormat(fields, SOUND_FORMAT, SOUND_VERSION);
  return new Set(fields.list("images", MAX_IMAGES).map(String));
}
