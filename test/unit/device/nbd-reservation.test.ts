// SPDX-License-Identifier: AGPL-3.0-or-later
// Who gets which /dev/nbdX, on a made tree of sysfs. Contention with other programs: test/interop/device.
import { execFile } from "node:child_process";
import { once } from "node:events";
import { link, mkdir, readdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import net from "node:net";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { HostError } from "../../../src/core/index.ts";
import { formatReservations, parseReservations, reserveNbdNode } from "../../../src/device/nbd-reservation.ts";
import { NbdTree } from "../../support/nbd/nbd-tree.ts";
import { requireRoot } from "../../support/programs/tools.ts";

const NODES = 4;
const NOW = 1_700_000_000;
const run = promisify(execFile);
const never = new AbortController().signal;

let tree: NbdTree;

const nowSeconds = (): number => Math.floor(Date.now() / 1000);

/** The index of the node that is reserved next; the reservation stays. */
async function nextIndex(except: ReadonlySet<number> = new Set()): Promise<number> {
  return (await reserveNbdNode({ host: tree.host, except, signal: never })).index;
}

async function refusal(): Promise<HostError> {
  const error: unknown = await reserveNbdNode({ host: tree.host, signal: never }).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof HostError)) throw new Error(`expected a refusal, got ${String(error)}`);
  return error;
}

describe("parseReservations()", () => {
  it.each([
    ["nothing", "", []],
    ["one line", `3 ${NOW}\n`, [[3, NOW]]],
    [
      "lines in any order, the last without newline",
      `7 ${NOW}\n0 ${NOW - 59}`,
      [
        [7, NOW],
        [0, NOW - 59],
      ],
    ],
    ["a tab between the numbers, as Perl's \\s allows", `3\t${NOW}\n`, [[3, NOW]]],
    ["no line that is 60 seconds old", `1 ${NOW - 60}\n2 ${NOW - 59}\n`, [[2, NOW - 59]]],
    ["no line from the future", `1 ${NOW + 60}\n2 ${NOW + 59}\n3 9${NOW}\n`, [[2, NOW + 59]]],
    ["no line that is malformed", `x ${NOW}\n-1 ${NOW}\n1.5 ${NOW}\n ${NOW}\n2\n2 ${NOW} 3\n\u0000\n2  ${NOW}\n`, []],
    ["no number beyond reason", `99999999999999999999 ${NOW}\n1 99999999999999999999\n`, []],
  ])("takes %s", (_, text, expected) => {
    expect([...parseReservations(text, NOW)]).toEqual(expected);
  });
});

describe("formatReservations()", () => {
  it("writes one line each, number, space, second", () => {
    expect(
      formatReservations(
        new Map([
          [12, NOW],
          [0, NOW - 5],
        ]),
      ),
    ).toBe(`12 ${NOW}\n0 ${NOW - 5}\n`);
  });
});

describe("reserveNbdNode()", () => {
  beforeEach(async (context) => {
    requireRoot(context); // device nodes
    tree = await NbdTree.create(NODES);
  });

  afterEach(async () => {
    vi.useRealTimers();
    await tree?.[Symbol.asyncDispose]();
  });

  it("takes the first free node, notes it with the time, and gives it back", async () => {
    const before = nowSeconds();
    const node = await reserveNbdNode({ host: tree.host, signal: never });
    expect(node).toMatchObject({ index: 0, path: path.join(tree.host.dev, "nbd0") });
    const [, index, second] = /^(\d+) (\d+)\n$/.exec(await tree.reservations()) ?? [];
    expect(index).toBe("0");
    expect(Number(second)).toBeGreaterThanOrEqual(before);
    expect(Number(second)).toBeLessThanOrEqual(nowSeconds());
    await node[Symbol.asyncDispose]();
    expect(await tree.reservations()).toBe("");
    await node[Symbol.asyncDispose](); // twice is no error
    expect(await readdir(path.dirname(tree.reservationFile))).toEqual(["reserved-dev-nbd-nodes"]);
  });

  it("passes over nodes that the kernel has in use, that others reserved, and that were tried", async () => {
    await tree.setPid(0, 4711);
    await tree.writeReservations(`1 ${nowSeconds() - 30}\n`);
    expect(await nextIndex(new Set([2]))).toBe(3);
  });

  it("passes over a node that has a size, or of which nothing is known", async () => {
    await tree.setSectors(0, 2048);
    await rm(tree.block(1), { recursive: true });
    expect(await nextIndex()).toBe(2);
  });

  it("passes over a node that has no block device in /dev", async () => {
    await rm(path.join(tree.host.dev, "nbd0"));
    await rm(path.join(tree.host.dev, "nbd1"));
    await writeFile(path.join(tree.host.dev, "nbd1"), "a file that somebody wrote here");
    expect(await nextIndex()).toBe(2);
  });

  it("passes over a node whose qemu-nbd is just starting, but not over a killed one's socket", async () => {
    const listener = net.createServer().listen(path.join(tree.host.sockets, "qemu-nbd-nbd0"));
    await once(listener, "listening");
    expect((await stat(await tree.leaveSocket(1))).isSocket()).toBe(true);
    expect(await nextIndex()).toBe(1);
    listener.close();
  });

  it("takes a node again when its reservation is 60 seconds old", async () => {
    vi.useFakeTimers({ toFake: ["Date"] });
    expect([await nextIndex(), await nextIndex()]).toEqual([0, 1]);
    vi.setSystemTime(Date.now() + 59_000);
    expect(await nextIndex()).toBe(2);
    vi.setSystemTime(Date.now() + 1_000);
    expect([await nextIndex(), await nextIndex()]).toEqual([0, 1]);
  });

  it("leaves a reservation alone that another took after ours had expired", async () => {
    vi.useFakeTimers({ toFake: ["Date"] });
    const late = await reserveNbdNode({ host: tree.host, signal: never });
    vi.setSystemTime(Date.now() + 61_000);
    const next = await reserveNbdNode({ host: tree.host, signal: never });
    expect(next.index).toBe(0);
    await late[Symbol.asyncDispose]();
    expect(await tree.reservations()).toBe(`0 ${nowSeconds()}\n`);
  });

  it("keeps the valid lines of others, also for nodes that are not here, and drops the rest", async () => {
    const second = nowSeconds() - 10;
    await tree.writeReservations(`0 ${second}\n77 ${second}\nnonsense\n2 ${second - 60}\n`);
    await using node = await reserveNbdNode({ host: tree.host, signal: never });
    expect(node.index).toBe(1);
    const lines = (await tree.reservations()).split("\n");
    expect(lines).toHaveLength(4);
    expect(lines.slice(0, 2)).toEqual([`0 ${second}`, `77 ${second}`]);
    expect(lines[2]).toMatch(/^1 \d+$/);
  });

  it("reads no more than 64 KiB, and puts an orderly file in the place of a huge one", async () => {
    await tree.writeReservations(`0 ${nowSeconds()}\n${"x".repeat(1024 * 1024)}\n1 ${nowSeconds()}\n`);
    expect(await nextIndex()).toBe(1);
    expect((await tree.reservations()).length).toBeLessThan(64);
  });

  it("neither reads nor writes through a symbolic link", async () => {
    const target = path.join(tree.dir, "target");
    await mkdir(path.dirname(tree.reservationFile), { recursive: true });
    await writeFile(target, `0 ${nowSeconds()}\n`);
    await symlink(target, tree.reservationFile);
    const before = await readFile(target, "utf8");
    expect(await nextIndex()).toBe(0);
    expect(await readFile(target, "utf8")).toBe(before);
    expect(await tree.reservations()).toMatch(/^0 \d+\n$/);
  });

  it("replaces the file whole: who has the old one open reads it to its end", async () => {
    await tree.writeReservations(`0 ${nowSeconds()}\n`);
    await link(tree.reservationFile, path.join(tree.dir, "old"));
    await nextIndex();
    expect(await readFile(path.join(tree.dir, "old"), "utf8")).toMatch(/^0 \d+\n$/);
  });

  describe("under umask 077", () => {
    let umask: number;
    beforeEach(() => {
      umask = process.umask(0o077);
    });
    afterEach(() => void process.umask(umask));

    const modeOf = async (file: string): Promise<number> => (await stat(file)).mode & 0o7777;

    it("makes folders and files as Proxmox VE makes them: writable by root, readable by all", async () => {
      const folders = [path.dirname(tree.lockFile), path.dirname(path.dirname(tree.lockFile))];
      await nextIndex();
      for (const folder of [...folders, path.dirname(tree.reservationFile)]) expect(await modeOf(folder)).toBe(0o755);
      for (const file of [tree.lockFile, tree.reservationFile]) expect(await modeOf(file)).toBe(0o644);
      expect(await readFile(tree.lockFile, "utf8")).toBe("");
    });

    it("leaves folders and lock as it finds them, and replaces the list by one that all can read", async () => {
      const folders = [path.dirname(tree.lockFile), path.dirname(tree.reservationFile)];
      for (const folder of folders) await mkdir(folder, { recursive: true });
      await writeFile(tree.lockFile, "not ours");
      await writeFile(`${tree.reservationFile}.new`, "of one that was killed");
      await nextIndex();
      for (const folder of folders) expect(await modeOf(folder)).toBe(0o700);
      expect(await modeOf(tree.lockFile)).toBe(0o600);
      expect(await readFile(tree.lockFile, "utf8")).toBe("not ours");
      expect(await modeOf(tree.reservationFile)).toBe(0o644);
    });
  });

  it("is not held up by a FIFO in the place of the file", async () => {
    await mkdir(path.dirname(tree.reservationFile), { recursive: true });
    await run("mkfifo", [tree.reservationFile]);
    expect(await nextIndex()).toBe(0);
  });

  it("keeps to nbds_max, and says how to get more when all are taken", async () => {
    for (let index = 0; index < NODES; index++) expect(await nextIndex()).toBe(index);
    const error = await refusal();
    expect(error.message).toBe(`Cannot use /dev/nbdX: none of ${NODES} nodes is free`);
    expect(error.hint).toContain("modprobe nbd nbds_max=16");
    expect(error.code).toBe("ENVIRONMENT");
  });

  it("takes no node beyond nbds_max, though there are more", async () => {
    await writeFile(path.join(tree.host.sys, "module/nbd/parameters/nbds_max"), "1\n");
    expect(await nextIndex()).toBe(0);
    expect((await refusal()).message).toContain("none of 1 nodes is free");
  });

  it("says how to load the module when it is missing, and makes no file", async () => {
    await using bare = await NbdTree.create(undefined);
    const attempt = reserveNbdNode({ host: bare.host, signal: never });
    await expect(attempt).rejects.toThrow(/^Cannot use \/dev\/nbdX: the kernel module nbd is not loaded$/);
    await expect(attempt).rejects.toMatchObject({ hint: expect.stringContaining("modprobe nbd nbds_max=16") });
    expect(await readdir(bare.host.run)).toEqual([]);
  });

  it("refuses an nbds_max that is no number", async () => {
    await writeFile(path.join(tree.host.sys, "module/nbd/parameters/nbds_max"), "many\n");
    expect((await refusal()).message).toMatch(/nbds_max" holds no number$/);
  });
});
