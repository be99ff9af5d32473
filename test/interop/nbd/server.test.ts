// SPDX-License-Identifier: AGPL-3.0-or-later
// The server against the clients it is made for: libnbd's tools, QEMU's, our own, and a disk that
// qemu-storage-daemon makes a FUSE file of.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile, stat, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { runTool, seededBytes } from "../../../fixtures/lab/index.ts";
import { BASE_ALLOCATION, NbdConnection } from "../../../src/nbd/index.ts";
import { MemoryExport } from "../../support/nbd/memory-export.ts";
import { failureOf, patience } from "../../support/nbd/nbd-client.ts";
import { type ScratchFolder, scratchFolder } from "../../support/nbd/nbd-servers.ts";
import { type Served, serve } from "../../support/nbd/serve-nbd.ts";
import { requireRoot, requireTool } from "../../support/programs/tools.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
/** A multiple of 512 and of nothing larger. */
const SIZE = 16 * MIB + 512;
const ZEROES = [
  { offset: MIB, length: 2 * MIB },
  { offset: 5 * MIB, length: 64 * KIB },
  { offset: 7 * MIB + 512, length: KIB },
  { offset: 10 * MIB, length: 5 * MIB },
  { offset: SIZE - 512, length: 512 },
];
/** Zeroes that the export calls data: content and map can not be mistaken for each other. */
const WRITTEN_ZEROES = { offset: 3 * MIB, length: 128 * KIB };
/** The map by hand: length and whether it is a hole. */
const MAP: readonly (readonly [number, boolean])[] = [
  [MIB, false],
  [2 * MIB, true],
  [2 * MIB, false],
  [64 * KIB, true],
  [2 * MIB - 64 * KIB + 512, false],
  [KIB, true],
  [3 * MIB - 512 - KIB, false],
  [5 * MIB, true],
  [MIB, false],
  [512, true],
];

const bytes = seededBytes("served", SIZE);
for (const { offset, length } of [...ZEROES, WRITTEN_ZEROES]) bytes.fill(0, offset, offset + length);

let folder: ScratchFolder;
let served: Served;
const disk = new MemoryExport({ name: "drive-scsi0", description: "of 10:00", bytes, zeroes: ZEROES });
const small = new MemoryExport({ name: "drive-scsi1", description: "", bytes: Buffer.alloc(MIB, 1) });
const broken = new MemoryExport({
  ...{ name: "broken", bytes: Buffer.alloc(4 * MIB, 1) },
  onRead: async ({ offset, length }) => {
    if (offset + length > 3 * MIB) throw new Error("cluster 48 is not what was written");
  },
});
const uri = (name = "drive-scsi0"): string => `nbd+unix:///${name}?socket=${served.path}`;
const isSame = async (file: string): Promise<boolean> => (await readFile(file)).equals(bytes);

beforeAll(async () => {
  folder = await scratchFolder();
  served = await serve([disk, small, broken]);
});
afterAll(async () => {
  await served[Symbol.asyncDispose]();
  await folder[Symbol.asyncDispose]();
});

describe("nbdinfo", () => {
  it("shows what the server offers", async (context) => {
    requireTool(context, "nbdinfo");
    const info = JSON.parse(await runTool("nbdinfo", ["--json", uri()]));
    expect(info).toMatchObject({ protocol: "newstyle-fixed", TLS: false, structured: true });
    expect(info.exports[0]).toMatchObject({
      ...{ "export-name": "drive-scsi0", description: "of 10:00", "export-size": SIZE },
      ...{ contexts: ["base:allocation"], is_read_only: true, can_multi_conn: true, can_df: true },
      ...{ can_flush: false, can_trim: false, can_zero: false, can_cache: false, can_fua: false },
      ...{ block_size_minimum: 1, block_size_preferred: 65536, block_size_maximum: 33554432 },
    });
  });

  it("lists the exports", async (context) => {
    requireTool(context, "nbdinfo");
    const info = JSON.parse(await runTool("nbdinfo", ["--list", "--json", uri("")]));
    const names = info.exports.map((one: Record<string, unknown>) => [one["export-name"], one["export-size"]]);
    expect(names).toEqual([
      ["drive-scsi0", SIZE],
      ["drive-scsi1", MIB],
      ["broken", 4 * MIB],
    ]);
  });

  it("shows the map", async (context) => {
    requireTool(context, "nbdinfo");
    const map = JSON.parse(await runTool("nbdinfo", ["--map", "--json", uri()]));
    expect(map.map((one: { length: number; type: number }) => [one.length, one.type])).toEqual(
      MAP.map(([length, isHole]) => [length, isHole ? 3 : 0]),
    );
  });

  it("is told that there is no such export", async (context) => {
    requireTool(context, "nbdinfo");
    const failure = await failureOf(runTool("nbdinfo", [uri("drive-scsi9")]));
    expect(failure.message).toMatch(/there is no such export|no such/i);
  });
});

describe("nbdcopy", () => {
  it.for([
    ["one connection", ["--connections=1"]],
    ["four connections", ["--connections=4"]],
    ["requests of 2 MiB", ["--connections=4", "--request-size=2097152"]],
    ["requests of 32 MiB", ["--request-size=33554432", "--requests=4"]],
    ["small requests and no map", ["--request-size=4096", "--no-extents"]],
    ["one request at a time", ["--synchronous"]],
  ] as const)("copies the disk: %s", async ([, options], context) => {
    requireTool(context, "nbdcopy");
    const file = folder.file("nbdcopy.raw");
    await runTool("nbdcopy", [...options, uri(), file]);
    expect(await isSame(file)).toBe(true);
  });

  it("fails with the error of the read", async (context) => {
    requireTool(context, "nbdcopy");
    served.errors.length = 0;
    const failure = await failureOf(runTool("nbdcopy", ["--connections=1", uri("broken"), folder.file("broken.raw")]));
    expect(failure.message).toMatch(/Input\/output error/);
    expect(served.errors.length).toBeGreaterThan(0);
    expect(served.errors[0]).toMatchObject({ where: { exportName: "broken" } });
  });

  it("that is killed in the middle leaves nothing behind", async (context) => {
    requireTool(context, "nbdcopy");
    let reads = 0;
    const slow = new MemoryExport({
      ...{ name: "slow", bytes: Buffer.alloc(256 * MIB, 1) },
      onRead: async (_range, signal) => {
        reads++;
        await sleep(5, undefined, { signal });
      },
    });
    await using own = await serve([slow]);
    for (let round = 0; round < 5; round++) {
      reads = 0;
      const child = spawn("nbdcopy", ["-C", "4", `nbd+unix:///slow?socket=${own.path}`, "null:"], { stdio: "ignore" });
      while (reads < 20) await sleep(5);
      child.kill("SIGKILL");
      await once(child, "exit");
      while (slow.pending > 0) await sleep(5);
    }
    expect(own.errors).toEqual([]);
    await runTool("nbdinfo", ["--size", `nbd+unix:///slow?socket=${own.path}`]);
  });
});

describe("qemu-img", () => {
  it("converts the disk, and keeps its holes", async (context) => {
    requireTool(context, "qemu-img");
    const file = folder.file("convert.raw");
    await runTool("qemu-img", ["convert", "-f", "raw", "-O", "raw", uri(), file]);
    expect(await isSame(file)).toBe(true);
    expect((await stat(file)).blocks * 512).toBeLessThan(SIZE - 6 * MIB);
  });

  it("converts it with eight requests out of order", async (context) => {
    requireTool(context, "qemu-img");
    const file = folder.file("convert-w.raw");
    await runTool("qemu-img", ["convert", "-W", "-m", "8", "-f", "raw", "-O", "raw", uri(), file]);
    expect(await isSame(file)).toBe(true);
  });

  it("shows the map", async (context) => {
    requireTool(context, "qemu-img");
    expect(await qemuMap(uri())).toEqual(MAP);
  });

  it("fails with the error of the read", async (context) => {
    requireTool(context, "qemu-img");
    const failure = await failureOf(
      runTool("qemu-img", ["convert", "-f", "raw", "-O", "raw", uri("broken"), folder.file("broken.raw")]),
    );
    expect(failure.message).toMatch(/Input\/output error/);
  });
});

/** What qemu-img says of the holes of an image or a file, neighbours joined. */
async function qemuMap(image: string): Promise<[number, boolean][]> {
  const output = await runTool("qemu-img", ["map", "--output=json", "-f", "raw", image]);
  const list: [number, boolean][] = [];
  for (const { length, zero } of JSON.parse(output) as { length: number; zero: boolean }[]) {
    const last = list.at(-1);
    if (last !== undefined && last[1] === zero) last[0] += length;
    else list.push([length, zero]);
  }
  return list;
}

describe("qemu-io", () => {
  it("reads across the ends of holes, off every block", async (context) => {
    requireTool(context, "qemu-io");
    const commands = ["read -P 0 1M 2M", "read -P 0 3145729 1021", "read -P 0 10M 5M", "read -v 7340030 1030"];
    const output = await runTool("qemu-io", ["-r", "-f", "raw", ...commands.flatMap((one) => ["-c", one]), uri()]);
    expect(output).not.toMatch(/verification failed/);
    const dump = [...output.matchAll(/^[0-9a-f]{8}: {2}((?:[0-9a-f]{2} )+)/gm)].map(([, row = ""]) => row).join("");
    expect(Buffer.from(dump.replaceAll(" ", ""), "hex")).toEqual(bytes.subarray(7340030, 7340030 + 1030));
  });

  it("cannot open the disk for writing", async (context) => {
    requireTool(context, "qemu-io");
    const failure = await failureOf(runTool("qemu-io", ["-f", "raw", "-c", "write 0 512", uri()]));
    expect(failure.message).toMatch(/Permission denied/);
  });
});

describe("our own client", () => {
  it("reads everything with many requests at once, and the map", async () => {
    await using connection = await NbdConnection.open({
      ...{ address: served.address, exportName: "drive-scsi0", metaContexts: [BASE_ALLOCATION], signal: patience() },
    });
    expect(connection).toMatchObject({ sizeBytes: SIZE, isReadOnly: true, canMultiConn: true });
    const got = Buffer.alloc(SIZE, 0xee);
    const step = 100_003;
    const reads: Promise<void>[] = [];
    for (let at = 0; at < SIZE; at += step) {
      reads.push(connection.read(at, got.subarray(at, Math.min(SIZE, at + step)), patience()));
    }
    await Promise.all(reads);
    expect(got.equals(bytes)).toBe(true);
    const lists = await connection.blockStatus(0, SIZE, patience());
    const map = lists.get(BASE_ALLOCATION)?.map(({ length, flags }) => [length, flags === 3]);
    expect(map).toEqual(MAP);
  });

  it("gets the reason of a failed read, and goes on", async () => {
    await using connection = await NbdConnection.open({
      ...{ address: served.address, exportName: "broken", signal: patience() },
    });
    const failure = await failureOf(connection.read(3 * MIB, Buffer.alloc(512), patience()));
    expect(failure.message).toBe(
      "Cannot read 512 bytes at 3145728: the NBD server answers EIO: cluster 48 is not what was written",
    );
    const good = Buffer.alloc(512);
    await connection.read(0, good, patience());
    expect(good).toEqual(Buffer.alloc(512, 1));
  });
});

describe("nbdkit", () => {
  it("passes the disk on", async (context) => {
    requireTool(context, "nbdkit", "nbdcopy");
    const file = folder.file("nbdkit.raw");
    const run = `nbdcopy "$uri" ${file}`;
    await runTool("nbdkit", ["-U", "-", "nbd", `socket=${served.path}`, "export=drive-scsi0", "--run", run]);
    expect(await isSame(file)).toBe(true);
  });
});

describe("qemu-storage-daemon", () => {
  it("makes a FUSE file of the disk, with its bytes and its holes", async (context) => {
    requireRoot(context);
    requireTool(context, "qemu-storage-daemon", "qemu-img");
    const [file, pidFile] = [folder.file("disk"), folder.file("qsd.pid")];
    await writeFile(file, "");
    const node = `driver=nbd,node-name=disk,server.type=unix,server.path=${served.path},export=drive-scsi0,read-only=on`;
    const daemon = spawn("qemu-storage-daemon", [
      ...["--blockdev", node, "--pidfile", pidFile],
      ...["--export", `type=fuse,id=file,node-name=disk,mountpoint=${file},writable=off`],
    ]);
    let complaint = "";
    daemon.stderr.on("data", (data: Buffer) => {
      complaint += data;
    });
    const exited = once(daemon, "exit");
    try {
      while ((await stat(file)).size !== SIZE) {
        if (daemon.exitCode !== null) throw new Error(`qemu-storage-daemon: ${complaint}`);
        await sleep(20);
      }
      expect(await isSame(file)).toBe(true);
      // QEMU asks a file for its holes with lseek(), SEEK_DATA and SEEK_HOLE.
      expect(await qemuMap(file)).toEqual(MAP);
    } finally {
      daemon.kill("SIGTERM");
      await exited;
    }
  });
});
