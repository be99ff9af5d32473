// SPDX-License-Identifier: AGPL-3.0-or-later
// Jobs with mechanism "file-handle" on a provider in this process, which then also plays the Perl side.
import { type LabBackup, LabFileHandle } from "../../../fixtures/lab/index.ts";
import type { DirtyRegions, FileHandleCalls, Range, VmVolume } from "../../../src/provider/index.ts";

/** Answers of the Perl side that differ from the truth. */
interface Lies {
  /** Replaces nbdinfo's regions; a generator may be endless. */
  readonly regions?: Iterable<Range>;
  /** The error with which deallocate dies. */
  readonly deallocate?: string;
  /** Replaces what is said about a volume. */
  readonly volume?: Partial<VmVolume>;
}

/** All devices of a backup access, passed as files, and the Perl side for them. */
export class HandedOver implements FileHandleCalls, AsyncDisposable {
  readonly volumes: ReadonlyMap<string, VmVolume>;
  readonly given: Range[][] = [];
  /** How long each batch of regions was allowed to take. */
  readonly timeoutsMs: number[] = [];
  readonly #handles: ReadonlyMap<string, LabFileHandle>;
  readonly #lies: Lies;
  readonly #lying: Iterator<Range> | undefined;

  private constructor(volumes: ReadonlyMap<string, VmVolume>, handles: ReadonlyMap<string, LabFileHandle>, lies: Lies) {
    this.volumes = volumes;
    this.#handles = handles;
    this.#lies = lies;
    this.#lying = lies.regions?.[Symbol.iterator]();
  }

  static async open(access: LabBackup, lies: Lies = {}): Promise<HandedOver> {
    const handles = new Map<string, LabFileHandle>();
    const volumes = new Map<string, VmVolume>();
    for (const [device, volume] of Object.entries(access.volumes)) {
      const handle = await LabFileHandle.open(device, volume);
      handles.set(device, handle);
      volumes.set(device, {
        size: volume.size,
        bitmapMode: volume["bitmap-mode"],
        nbdPath: undefined,
        bitmapName: undefined,
        fileHandle: handle.reference,
        ...lies.volume,
      });
    }
    return new HandedOver(volumes, handles, lies);
  }

  handle(device: string): LabFileHandle {
    const handle = this.#handles.get(device);
    if (handle === undefined) throw new Error(`${device} is not handed over`);
    return handle;
  }

  async nextDirtyRegions(device: string, max: number, timeoutMs: number): Promise<DirtyRegions> {
    this.timeoutsMs.push(timeoutMs);
    const regions: Range[] = [];
    while (regions.length < max) {
      const next = this.#lying?.next();
      const region = next === undefined ? await this.handle(device).nextDirtyRegion() : next.value;
      if (region === undefined) return { regions, done: true };
      regions.push(region);
    }
    return { regions, done: false };
  }

  async deallocate(device: string, ranges: readonly Range[]): Promise<void> {
    this.given.push([...ranges]);
    if (this.#lies.deallocate !== undefined) throw new Error(this.#lies.deallocate);
    for (const range of ranges) await this.handle(device).deallocate(range);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const handle of this.#handles.values()) await handle[Symbol.asyncDispose]();
  }
}

/** For jobs: how their devices are passed. */
export const handing =
  (lies: Lies = {}) =>
  (access: LabBackup): Promise<HandedOver> =>
    HandedOver.open(access, lies);
