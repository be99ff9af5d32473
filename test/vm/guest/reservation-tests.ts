// SPDX-License-Identifier: AGPL-3.0-or-later
// Nodes shared with others: the file of reservations, its lock against Perl's, two processes at once.
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { access, mkdir, open, readFile, rm, rmdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { until } from "../../../fixtures/lab/index.ts";
import { nbdHost, openRawView } from "../../../src/device/index.ts";
import { reserveNbdNode } from "../../../src/device/nbd-reservation.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import type { ExpectedDisk } from "../protocol.ts";
import type { VmTest } from "./runner.ts";
import {
  endOf,
  firstLine,
  fullImage,
  fullPoint,
  leftovers,
  NODES,
  never,
  newestPoint,
  nodeBytes,
  nodeOf,
  nothing,
  outputOf,
  RESERVATIONS,
  RESERVATIONS_LOCK,
  Restore,
  RUN_DIR,
  refusalOf,
  startRole,
} from "./world.ts";

const ROUNDS = 50;
/** Rounds that also connect the node: starting qemu-nbd takes its time in an emulated machine. */
const CONNECT_EVERY = 25;
/** Longer than the other needs to ask once. */
const HOLD_MS = 50;
const ROUND_TIMEOUT_MS = 60_000;
const HELD = "/tmp/held";
const host = nbdHost();
const nowSeconds = (): number => Math.floor(Date.now() / 1_000);
const [, second] = fullPoint.disks;

async function reserveByOthers(lines: readonly string[]): Promise<AsyncDisposable> {
  await mkdir(path.dirname(RESERVATIONS), { recursive: true });
  await writeFile(RESERVATIONS, lines.map((line) => `${line}\n`).join(""));
  return { [Symbol.asyncDispose]: async () => await rm(RESERVATIONS, { force: true }) };
}

/** Perl with the lock, as PVE's lock_file takes it; ends when its standard input does. */
async function lockByPerl(): Promise<ChildProcess> {
  const script = `use Fcntl qw(:flock); $| = 1; open(my $fh, '>>', $ARGV[0]) or die; flock($fh, LOCK_EX) or die;
    print "locked\\n"; <STDIN>;`;
  await mkdir(path.dirname(RESERVATIONS_LOCK), { recursive: true });
  const perl = spawn("perl", ["-e", script, RESERVATIONS_LOCK], { stdio: ["pipe", "pipe", "inherit"] });
  assert.equal(await firstLine(perl), "locked");
  return perl;
}

export const reservations: VmTest[] = [
  {
    name: "others' reservations count for 60 s, and ours is in the file while it lasts",
    run: async () => {
      const now = nowSeconds();
      await using _others = await reserveByOthers([`0 ${now}`, `1 ${now - 3_600}`]);
      {
        await using ours = await reserveNbdNode({ host, signal: never });
        assert.equal(ours.index, 1);
        const [other, own, ...more] = (await readFile(RESERVATIONS, "utf8")).split("\n");
        assert.equal(other, `0 ${now}`);
        const since = Number(/^1 ([0-9]+)$/.exec(own ?? "")?.[1]);
        assert.ok(since >= now && since <= nowSeconds(), `${own} is of this minute`);
        assert.deepEqual(more, [""]);
      }
      assert.equal(await readFile(RESERVATIONS, "utf8"), `0 ${now}\n`);
    },
  },
  {
    name: "a reservation waits for the Perl process that holds the lock",
    run: async () => {
      const perl = await lockByPerl();
      let isReserved = false;
      const reserving = reserveNbdNode({ host, signal: never }).then((reservation) => {
        isReserved = true;
        return reservation;
      });
      await sleep(1_000);
      assert.equal(isReserved, false);
      perl.stdin?.end();
      await using _ours = await reserving;
      await endOf(perl);
    },
  },
  {
    name: "with all nodes taken, nbd is refused and auto falls back to a FUSE file with one line",
    run: async () => {
      const now = nowSeconds();
      await using _others = await reserveByOthers(Array.from({ length: NODES }, (_, node) => `${node} ${now + 30}`)); // a slow machine
      {
        await using restore = await Restore.begin(newestPoint, "nbd");
        const { message, hint } = await refusalOf(restore.offer(second.device));
        assert.equal(message, `Cannot use /dev/nbdX: none of ${NODES} nodes is free`);
        assert.match(hint, /modprobe nbd nbds_max=/);
      }
      {
        await using restore = await Restore.begin(newestPoint, "auto");
        const file = await restore.offer(second.device);
        assert.ok(file.startsWith(`${RUN_DIR}/`), file);
        assert.equal(restore.log.length, 1);
        assert.match(restore.log[0] ?? "", /none of 3 nodes is free; a FUSE file is used instead/);
      }
    },
  },
  {
    name: `two processes that want the same node ${ROUNDS} times never have it at once, and lose none`,
    run: async () => {
      await mkdir(HELD);
      const outputs = await Promise.all([outputOf(startRole("contend", "0")), outputOf(startRole("contend", "1"))]);
      const seen = outputs.map((output) => JSON.parse(output) as Contest);
      for (const { rounds, connected, trouble } of seen) {
        assert.deepEqual(trouble, []);
        assert.deepEqual({ rounds, connected }, { rounds: ROUNDS, connected: ROUNDS / CONNECT_EVERY });
      }
      const refused = seen.reduce((sum, contest) => sum + contest.refused, 0);
      assert.ok(refused > ROUNDS / 2, `the two met ${refused} times only: this test has shown nothing`);
      assert.deepEqual(await leftovers(), nothing);
      await rm(HELD, { recursive: true });
      await using all = await reserveNbdNode({ host, signal: never });
      assert.equal(all.index, 0);
    },
  },
];

interface Contest {
  rounds: number;
  connected: number;
  /** How often the node was not free. */
  refused: number;
  readonly trouble: string[];
}

/** The role "contend": reserves node 0 again and again, connects it now and then, and says what it saw. */
export async function contend(which: 0 | 1): Promise<void> {
  const disk = fullPoint.disks[which];
  const seen: Contest = { rounds: 0, connected: 0, refused: 0, trouble: [] };
  for (; seen.rounds < ROUNDS; seen.rounds++) {
    if (seen.rounds % CONNECT_EVERY === 0) await connectOnce(disk, seen);
    await meet(seen.rounds, which);
    await reserveOnce(seen);
  }
  process.stdout.write(JSON.stringify(seen));
}

/** Waits for the other process, so that both want the node at the same moment. */
async function meet(round: number, which: number): Promise<void> {
  await writeFile(`${HELD}/round-${round}-${which}`, "");
  await until("the other process is there", async () => await exists(`${HELD}/round-${round}-${1 - which}`));
}

const exists = async (file: string): Promise<boolean> =>
  await access(file).then(
    () => true,
    () => false,
  );

async function reserveOnce(seen: Contest): Promise<void> {
  const endMs = performance.now() + ROUND_TIMEOUT_MS;
  while (!(await tryNodeZero(seen))) {
    if (performance.now() > endMs) throw new Error(`nobody lets go of it: ${JSON.stringify(await leftovers())}`);
    seen.refused++;
    await sleep(2);
  }
}

/** A function of its own: esbuild 0.28 compiles "using" wrongly in a loop that catches errors. @returns false if taken */
async function tryNodeZero(seen: Contest): Promise<boolean> {
  const except = new Set(Array.from({ length: NODES - 1 }, (_, node) => node + 1));
  try {
    await using reservation = await reserveNbdNode({ host, except, signal: never });
    await hold(reservation.index, seen, async () => await sleep(HOLD_MS));
    return true;
  } catch (error) {
    if (!/none of 3 nodes is free/.test(String(error))) throw error;
    return false;
  }
}

/** Any node may serve: what counts is that it shows this process's disk and not the other's. */
async function connectOnce(disk: ExpectedDisk, seen: Contest): Promise<void> {
  const { sizeBytes, device } = disk;
  await using image = await openRegularFile(fullImage(disk));
  await using view = await openRawView({
    chain: [image],
    sizeBytes,
    runDir: RUN_DIR,
    name: device,
    mechanism: "nbd",
    signal: never,
  });
  const node = nodeOf(view.path);
  await hold(node, seen, async () => {
    const size = await nodeBytes(node);
    if (size !== sizeBytes) seen.trouble.push(`${view.path} has ${size} bytes, ${device} has ${sizeBytes}`);
    await using file = await open(view.path);
    await file.read(Buffer.alloc(512), 0, 512, sizeBytes - 512);
  });
  seen.connected++;
}

/** mkdir() is the judge: of two processes with the same node one finds the other's folder. */
async function hold(node: number, seen: Contest, use: () => Promise<unknown>): Promise<void> {
  const mark = `${HELD}/nbd${node}`;
  try {
    await mkdir(mark);
  } catch {
    seen.trouble.push(`node ${node} is held twice in round ${seen.rounds}`);
    return;
  }
  await use();
  await rmdir(mark);
}
