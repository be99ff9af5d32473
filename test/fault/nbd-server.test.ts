// SPDX-License-Identifier: AGPL-3.0-or-later
// QEMU's NBD server dies, hangs or answers with an error, at every kind of moment of a backup. A proxy in front of
// the real server finds the moment; what dies is the real server.
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import type { HostError } from "../../src/core/index.ts";
import type { VmVolume } from "../../src/provider/index.ts";
import {
  CMD_BLOCK_STATUS,
  CMD_DISC,
  CMD_READ,
  CMD_TRIM,
  EINVAL,
  EIO,
  OPT_GO,
  OPT_SET_META_CONTEXT,
  REP_ERR_POLICY,
} from "../support/nbd/nbd-bytes.ts";
import { type ClientStep, type FaultPlan, NbdFaultProxy } from "../support/nbd/nbd-fault-proxy.ts";
import { TestNode } from "../support/node/test-node.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { DISK, MIB, never, openJob, QEMU_ENDED, startGuest, VMID } from "../support/vm/vm-rules.ts";

const SIZE = 96 * MIB;
const MIDDLE = 40 * MIB;
/** Long enough to be worth a discard. */
const ZEROES = { offset: 44 * MIB, length: 40 * MIB };
/** What is read after the discard. */
const TAIL_BYTES = 4 * MIB;
const LAST = SIZE - MIB;
const LANES = 5;
/** Bytes per second: a discard follows what is written, and must come before all is read. */
const LIMIT = 12 * MIB;
const HANG_MS = 3_000;
const HANGS = /^Cannot back up "drive-scsi0": the QEMU process of VM 100 hangs, .* did not (answer for|end within) 3 s/;
const PATIENT_MS = 60_000;

const requestOf = (type: number) => (step: ClientStep) => step.kind === "request" && step.type === type;
const readOf = (place: number) => (step: ClientStep) =>
  step.kind === "request" && step.type === CMD_READ && step.offset <= place && place < step.offset + step.length;
const optionOf = (option: number) => (step: ClientStep) => step.kind === "option" && step.option === option;

interface Moment {
  readonly name: string;
  readonly at: (step: ClientStep) => boolean;
  /** What an error is here; undefined where there is none to give. */
  readonly error?: number;
  /** What the job says of that error; undefined if the backup goes on without what was refused. */
  readonly says?: RegExp;
  /** What is warned of where it goes on; default: nothing. */
  readonly warns?: RegExp;
  /** Whether all is read by then, so that nothing matters any more; "maybe" where reads overtake it. */
  readonly isOver?: boolean | "maybe";
  readonly isIncrementalOnly?: boolean;
}

const NO_GREETING = /^Cannot read NBD greeting: magic is 0x485454502f312e31, no NBD server listens there$/;
const BROKEN = new RegExp(
  `^Cannot read "${DISK}": QEMU gave up the snapshot of the disk during the backup \\(EINVAL\\), as it does when the fleecing storage is full or too slow$`,
);
const READ_ERROR = new RegExp(
  `^Cannot read "${DISK}": cannot read \\d+ bytes at \\d+: the NBD server answers EIO: injected$`,
);

const MOMENTS: readonly Moment[] = [
  { name: "at connect", at: (step) => step.kind === "connect", error: 1, says: NO_GREETING },
  {
    ...{ name: "at the second connect", at: (step) => step.kind === "connect" && step.connection === 2, error: 1 },
    ...{ says: NO_GREETING, isIncrementalOnly: true },
  },
  {
    ...{ name: "in the negotiation of contexts", at: optionOf(OPT_SET_META_CONTEXT), error: REP_ERR_POLICY },
    // Without base:allocation everything is read, which is right too.
  },
  {
    ...{ name: "in the negotiation of the bitmap", error: REP_ERR_POLICY, isIncrementalOnly: true },
    at: (step) => step.kind === "option" && step.option === OPT_SET_META_CONTEXT && step.connection === 2,
    says: /^Cannot back up "drive-scsi0": QEMU does not offer the bitmap "snapshot-access:bk" with its NBD export$/,
  },
  {
    ...{ name: "at the opening of the export", at: optionOf(OPT_GO), error: REP_ERR_POLICY },
    says: /^Cannot open NBD export "drive-scsi0": the server's policy forbids it$/,
  },
  {
    ...{ name: "at the first block status", at: requestOf(CMD_BLOCK_STATUS), error: EIO },
    says: /^Cannot read (?:the block map of )?"drive-scsi0": cannot query the block status of \d+ bytes at \d+: the NBD server answers EIO: injected$/,
  },
  { name: "in the middle of the reads", at: readOf(MIDDLE), error: EINVAL, says: BROKEN },
  {
    ...{ name: "at a discard", at: requestOf(CMD_TRIM), error: EIO, isOver: "maybe" },
    warns: /^warn: drive-scsi0: no more discards of the fleecing image: /,
  },
  { name: "at the last read", at: readOf(LAST), error: EIO, says: READ_ERROR },
  { name: "at the farewell", at: requestOf(CMD_DISC), isOver: true },
];

/** A guest, its disk, and what the store must hold of it; used by one cell at a time. */
interface Lane {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly ledger: VmLedger;
  cells: number;
}

const lanes: Lane[] = [];
const free: Lane[] = [];
const waiting: Array<(lane: Lane) => void> = [];

async function openLane(): Promise<Lane> {
  const node = await TestNode.create({ "dir-compression": "none" });
  const guest = await startGuest(node, { disks: [{ device: DISK, sizeBytes: SIZE }] });
  const lane = { node, guest, ledger: new VmLedger(node, guest), cells: 0 };
  lanes.push(lane);
  await lane.ledger.backUp();
  return lane;
}

beforeAll(async () => {
  for (let index = 0; index < LANES; index++) free.push(await openLane());
}, 180_000);
afterAll(async () => {
  for (const { node, guest } of lanes) {
    await guest[Symbol.asyncDispose]();
    await node[Symbol.asyncDispose]();
  }
});

async function withLane(work: (lane: Lane) => Promise<void>): Promise<void> {
  let lane = free.pop() ?? (await new Promise<Lane>((resolve) => waiting.push(resolve)));
  try {
    await work(lane);
  } catch (error) {
    lane = await openLane(); // one failure must not be the next cell's
    throw error;
  } finally {
    const next = waiting.shift();
    if (next === undefined) free.push(lane);
    else next(lane);
  }
}

type Mode = "full" | "incremental";

/** One job with the fault; the ledger has its point if it made one. @returns what it failed with, and its log */
async function jobWith(
  { guest, ledger, node }: Lane,
  mode: Mode,
  plan: FaultPlan,
  waitMs: number,
): Promise<{ error: HostError | undefined; log: string[] }> {
  const logStart = node.log.length;
  const epoch = ledger.takeEpoch();
  await using provider = node.provider(
    { "vm-backup-mode": mode },
    { timeouts: { connectTimeoutMs: waitMs, replyTimeoutMs: waitMs } },
  );
  const { access, archiveName } = await openJob(provider, guest, { epoch, oracleDir: `${node.dir}/oracle-${epoch}` });
  const volumes = access.vmVolumes();
  const real = volumes.get(DISK) as VmVolume;
  const nbdPath = path.join(guest.dir, "proxy.sock");
  const proxy = await NbdFaultProxy.start(nbdPath, () => real.nbdPath ?? "", plan);
  volumes.set(DISK, { ...real, nbdPath });
  const info = { bandwidthLimit: LIMIT, firewallConfig: undefined };
  const error = await provider.backup.backupVm(VMID, Buffer.from(guest.guestConfig), volumes, info, never).then(
    () => undefined,
    (thrown: unknown) => thrown as HostError,
  );
  await proxy[Symbol.asyncDispose]();
  await access.finish(error === undefined);
  await provider.backup.backupCleanup(VMID, "qemu", error === undefined, error?.message, never);
  if (error === undefined) ledger.add(`backup/${archiveName}`, access.oracles);
  await provider.backup.jobCleanup(never);
  expect(proxy.isReached).toBe(true);
  return { error, log: node.log.slice(logStart) };
}

/** What the guest does before each job: data in the middle and at the end, zeroes in between. */
async function change({ cells, guest }: Lane): Promise<void> {
  await guest.write(DISK, MIDDLE, seededBytes(`middle ${cells}`, MIB));
  await guest.writeZeroes(DISK, ZEROES.offset, ZEROES.length);
  await guest.write(DISK, SIZE - TAIL_BYTES, seededBytes(`tail ${cells}`, TAIL_BYTES));
}

const expectOneSentence = (error: HostError | undefined): void => {
  expect(error?.message).toMatch(/^[A-Z][^\n]*[^\n.]$/);
};

/** Whether the backup must have succeeded. */
const isDone = ({ isOver = false }: Moment, error: HostError | undefined): boolean =>
  isOver === "maybe" ? error === undefined : isOver;

const cellsOf = (wanted: (moment: Moment) => boolean): Array<readonly [Mode, string, Moment]> =>
  (["full", "incremental"] as const).flatMap((mode) =>
    MOMENTS.filter((one) => wanted(one) && (mode === "incremental" || one.isIncrementalOnly !== true)).map(
      (moment) => [mode, moment.name, moment] as const,
    ),
  );

/** The state after a cell: a sound store, and a next backup that holds what the failed job did not get. */
async function expectSound(lane: Lane, mode: Mode, isLost: boolean): Promise<void> {
  const before = lane.ledger.newest;
  await lane.ledger.expectSettled();
  const next = await lane.ledger.backUp();
  // A job in mode full uses no bitmap, and a QEMU that died has lost it.
  if (mode === "full" || isLost) expect(next).toBe("full: QEMU has no bitmap of it, or started a new one");
  else expect(next).toBe(`incremental since ${before}`);
  lane.cells++;
}

const TIMEOUT = { timeout: 180_000 };

describe.concurrent("an NBD server that dies", () => {
  it.each(cellsOf(() => true))("ends a backup (%s) in one sentence: %s", TIMEOUT, async (mode, _name, moment) => {
    await withLane(async (lane) => {
      await change(lane);
      const { guest } = lane;
      const plan = { at: moment.at, act: "close", before: () => guest.kill() } as const;
      const { error } = await jobWith(lane, mode, plan, PATIENT_MS);
      if (isDone(moment, error)) {
        expect(error).toBeUndefined();
      } else {
        expect(error?.code).toBe("SOURCE");
        expect(error?.message).toMatch(QEMU_ENDED);
      }
      await guest.restart();
      await expectSound(lane, mode, true);
    });
  });
});

describe.concurrent("an NBD server that hangs", () => {
  it.each(cellsOf(() => true))(
    "ends a backup (%s) after the time allowed: %s",
    TIMEOUT,
    async (mode, _name, moment) => {
      await withLane(async (lane) => {
        await change(lane);
        const startMs = performance.now();
        const { error } = await jobWith(lane, mode, { at: moment.at, act: "hang" }, HANG_MS);
        if (isDone(moment, error)) {
          expect(error).toBeUndefined(); // the farewell has a short limit of its own
        } else {
          expect(error?.code).toBe("SOURCE");
          expectOneSentence(error);
          expect(error?.message).toMatch(HANGS);
          expect(performance.now() - startMs).toBeGreaterThan(HANG_MS - 10);
        }
        await expectSound(lane, mode, false);
      });
    },
  );
});

describe.concurrent("an NBD server that answers with an error", () => {
  const cells = cellsOf((moment) => moment.error !== undefined);
  it.each(cells)("is named in one sentence, or done without (%s): %s", TIMEOUT, async (mode, _name, moment) => {
    await withLane(async (lane) => {
      await change(lane);
      const plan = { at: moment.at, act: { error: moment.error ?? 0 } };
      const { error, log } = await jobWith(lane, mode, plan, PATIENT_MS);
      if (moment.says === undefined) {
        expect(error, error?.message).toBeUndefined();
        const warned = log.filter((line) => line.startsWith("warn:"));
        expect(warned).toEqual(moment.warns === undefined ? [] : [expect.stringMatching(moment.warns)]);
      } else {
        expectOneSentence(error);
        expect(error?.message).toMatch(moment.says);
      }
      await expectSound(lane, mode, false);
    });
  });
});

describe("the stores of all these jobs", () => {
  it("hold nothing but right backups", TIMEOUT, async () => {
    expect(free).toHaveLength(LANES);
    for (const { ledger } of free) await ledger.expectAllRight();
    expect(free.reduce((sum, { cells }) => sum + cells, 0)).toBe(
      2 * cellsOf(() => true).length + cellsOf((moment) => moment.error !== undefined).length,
    );
  });
});
