// SPDX-License-Identifier: AGPL-3.0-or-later
// The product's first duty as one test: whatever happens to a guest and its jobs over many generations,
// every listed backup restores bit for bit. The judge is qemu-img compare with copies taken at the time.
import path from "node:path";
import { describe, expect, it } from "vitest";
import { compareRaw, isSnapshotSafeFromZeroes, LabGuest, SeededRandom, seededBytes } from "../../fixtures/lab/index.ts";
import { isFull, MATRIX_TIMEOUT_MS } from "../support/fault/full-matrix.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { HandedOver } from "../support/vm/file-handles.ts";
import { backUp, type FailAt, type JobResult, list, restore } from "../support/vm/vm-job.ts";

const MIB = 2 ** 20;
const VMID = 100;
/** Every event comes once in these, and a second time in the full matrix. */
const GENERATIONS = isFull ? 46 : 24;
/** Another one plays other histories. */
const SEED = Number(process.env.TEST_SEED ?? 20_261);

/** How the disks are handed over; nothing but the administrator's wish keeps it the same from job to job. */
type Mechanisms = "nbd" | "nbd or file-handle";

type Event =
  | "nothing"
  | "addDisk"
  | "removeDisk"
  | "resize"
  | "loseBitmap"
  | "restart"
  | "rollback"
  | "rollbackWithRam"
  | FailAt;
/** Half of the generations are plain. */
const EVENTS: readonly Event[] = [
  ...Array.from({ length: 12 }, (): Event => "nothing"),
  "addDisk",
  "removeDisk",
  "resize",
  "loseBitmap",
  "restart",
  "rollback",
  "rollbackWithRam",
  "backup_init",
  "query",
  "backup_vm",
  "after_backup_vm",
];

class History {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly random: SeededRandom;
  /** Volume name -> device -> raw copy of the disk at the time of the backup. */
  readonly expected = new Map<string, ReadonlyMap<string, string>>();
  readonly seen = new Map<string, number>();
  jobsByFile = 0;
  /** Every event once in a random order, then again: no seed leaves one out. */
  readonly #events: Event[] = [];
  readonly #mechanisms: Mechanisms;
  readonly #mayZeroDuringBackup: boolean;
  #disks = 1;

  constructor(
    node: TestNode,
    guest: LabGuest,
    random: SeededRandom,
    mechanisms: Mechanisms,
    mayZeroDuringBackup: boolean,
  ) {
    this.node = node;
    this.guest = guest;
    this.random = random;
    this.#mechanisms = mechanisms;
    this.#mayZeroDuringBackup = mayZeroDuringBackup;
  }

  async live(generation: number): Promise<void> {
    const event = this.#nextEvent();
    const state = event === "rollback" || event === "rollbackWithRam" ? await this.guest.saveState() : undefined;
    await this.scribble();
    if (event === "addDisk") await this.#addDisk();
    if (event === "removeDisk" && this.guest.devices.size > 1) await this.guest.removeDisk(this.#anyDevice());
    if (event === "resize") await this.#grow(this.#anyDevice());
    if (event === "loseBitmap") await this.guest.dropBitmap(this.#anyDevice());
    if (event === "restart") await this.guest.restart();
    if (state !== undefined) {
      // A backup between snapshot and rollback: after it, the old bitmap would miss what came in between.
      await this.#job(generation, undefined, 0);
      await this.scribble();
      await this.guest.rollback(state, { withRam: event === "rollbackWithRam" });
      await this.scribble();
    }
    const failAt = (["backup_init", "query", "backup_vm", "after_backup_vm"] as const).find((at) => at === event);
    await this.#job(generation, failAt, 1);
    this.seen.set(event, (this.seen.get(event) ?? 0) + 1);
  }

  /** Random writes, zero writes and discards; areas of all three differ and overlap. */
  async scribble(mayZero = true): Promise<void> {
    for (const [device, { size }] of this.guest.devices) {
      for (let count = this.random.integer(0, 5); count > 0; count--) {
        const length = Math.min(this.random.integer(1, 49) * 16 * 1024, size);
        const offset = this.random.integer(0, Math.floor((size - length) / 512) + 1) * 512;
        const kind = this.random.integer(mayZero ? 0 : 2, 6);
        if (kind === 0) await this.guest.writeZeroes(device, offset, length);
        else if (kind === 1) await this.guest.discard(device, offset, length);
        else if (kind === 2) await this.guest.write(device, offset, { pattern: this.random.integer(1, 256), length });
        else await this.guest.write(device, offset, seededBytes(this.random.next(), length));
      }
    }
  }

  async #job(generation: number, failAt: FailAt | undefined, part: number): Promise<void> {
    const before = new Set(await list(this.node, VMID));
    const isByFile = this.#mechanisms === "nbd or file-handle" && this.random.integer(0, 2) === 1;
    this.jobsByFile += isByFile ? 1 : 0;
    const job = await backUp(this.node, this.guest, {
      // Clocks jump: every fifth generation is dated before the one it follows.
      epoch: 1_700_000_000 + (generation % 5 === 4 ? -1 : 1) * (generation * 10 + part),
      failAt,
      oracleDir: path.join(this.node.dir, `oracle-${generation}-${part}`),
      during: () => this.scribble(this.#mayZeroDuringBackup),
      ...(isByFile ? { handOver: (access) => HandedOver.open(access) } : {}),
    });
    const added = (await list(this.node, VMID)).filter((volname) => !before.has(volname));
    this.#judge(job, failAt, added);
    for (const volname of added) this.expected.set(volname, job.oracles);
  }

  #judge(job: JobResult, failAt: FailAt | undefined, added: readonly string[]): void {
    if (failAt === undefined) expect(job.error, job.log.join("\n")).toBeUndefined();
    else if (failAt !== "backup_vm") expect(String(job.error)).toContain("injected");
    // A cancelled copy may have been faster than the cancellation: then it is a backup like any other.
    const isListed = failAt === undefined || failAt === "after_backup_vm" || job.error === undefined;
    expect(added, `${failAt}: ${job.log.join("\n")}`).toHaveLength(isListed ? 1 : 0);
  }

  async #addDisk(): Promise<void> {
    const device = `drive-scsi${this.#disks++}`;
    await this.guest.addDisk({
      device,
      sizeBytes: this.random.integer(9, 21) * MIB + this.random.integer(0, 128) * 512,
    });
    await this.guest.write(device, 0, seededBytes(this.random.next(), MIB));
  }

  async #grow(device: string): Promise<void> {
    const size = this.guest.devices.get(device)?.size ?? 0;
    await this.guest.resizeDisk(device, size + this.random.integer(1, 6) * MIB + 512);
  }

  #anyDevice(): string {
    const devices = [...this.guest.devices.keys()];
    return this.random.pick(devices);
  }

  #nextEvent(): Event {
    if (this.#events.length === 0) {
      this.#events.push(...EVENTS);
      for (let at = this.#events.length - 1; at > 0; at--) {
        const other = this.random.integer(0, at + 1);
        [this.#events[at], this.#events[other]] = [this.#events[other] as Event, this.#events[at] as Event];
      }
    }
    return this.#events.pop() ?? "nothing";
  }
}

describe("every listed backup", () => {
  it.for<[string, Mechanisms, number]>([
    ["none", "nbd", SEED],
    ["zstd", "nbd or file-handle", SEED + 1],
    ["zlib", "nbd or file-handle", SEED + 2],
  ])(
    `restores bit for bit after ${GENERATIONS} generations of everything (dir-compression %s, by %s, seed %i)`,
    { timeout: MATRIX_TIMEOUT_MS },
    async ([compression, mechanisms, seed], context) => {
      if (mechanisms !== "nbd") requireTool(context, "nbdfuse", "nbdinfo", "fusermount3");
      await using node = await TestNode.create({ "dir-compression": compression });
      await using guest = await LabGuest.start({
        dir: path.join(node.dir, "vm"),
        root: node.root,
        vmid: VMID,
        storeid: node.storeid,
        disks: [{ device: "drive-scsi0", sizeBytes: 21 * MIB + 512 }],
      });
      const isSafe = await isSnapshotSafeFromZeroes();
      const history = new History(node, guest, new SeededRandom(seed), mechanisms, isSafe);
      for (let generation = 0; generation < GENERATIONS; generation++) await history.live(generation);

      const listed = await list(node, VMID);
      expect(new Set(listed)).toEqual(new Set(history.expected.keys()));
      expect(listed.length).toBeGreaterThan(GENERATIONS * 0.7);
      for (const event of EVENTS) expect(history.seen.get(event) ?? 0, event).toBeGreaterThan(0);
      expect(history.jobsByFile > GENERATIONS / 5).toBe(mechanisms !== "nbd");
      // Without incrementals, or without fulls, the test would prove nothing.
      expect(node.log.filter((line) => line.includes(": incremental backup")).length).toBeGreaterThan(GENERATIONS / 4);
      const readsAll = node.log.filter((line) => /: full backup of |, all of .* is read \(/.test(line));
      expect(readsAll.length).toBeGreaterThan(GENERATIONS / 7);
      expect(readsAll.filter((line) => line.includes("is read (")).length).toBeGreaterThan(0);

      for (const volname of listed) {
        const oracles = history.expected.get(volname) ?? new Map<string, string>();
        const restored = await restore(node, volname, async (device, rawPath) => {
          const result = await compareRaw(rawPath, oracles.get(device) ?? "no such oracle");
          expect(result, `${volname} ${device}`).toMatchObject({ identical: true });
        });
        expect(new Set(restored.devices)).toEqual(new Set(oracles.keys()));
      }
    },
  );
});
