// SPDX-License-Identifier: AGPL-3.0-or-later
// The client against QEMU's own servers: qemu-nbd and qemu-storage-daemon.
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import type { NbdAddress } from "../../../src/nbd/address.ts";
import { AllocationFlag, BASE_ALLOCATION, DirtyFlag, NbdConnection } from "../../../src/nbd/index.ts";
import { failureOf, patience } from "../../support/nbd/nbd-client.ts";
import { freePort, type NbdServer, scratchFolder, startNbdServer } from "../../support/nbd/nbd-servers.ts";
import { requireTool } from "../../support/programs/tools.ts";

const KIB = 1024;
const MIB = 1024 * KIB;

/** Deterministic bytes that are never a run of zeroes. */
function noise(length: number, seed: string): Buffer {
  const blocks: Buffer[] = [];
  for (let index = 0; index * 32 < length; index++) {
    blocks.push(createHash("sha256").update(`${seed}:${index}`).digest());
  }
  return Buffer.concat(blocks).subarray(0, length);
}

const open = (server: NbdServer, exportName: string, metaContexts: readonly string[] = []): Promise<NbdConnection> =>
  NbdConnection.open({ address: server.address, exportName, metaContexts, signal: patience() });

/** Every extent of one context, over as many questions as it takes. */
async function mapOf(connection: NbdConnection, context: string): Promise<Array<[number, number, number]>> {
  const rows: Array<[number, number, number]> = [];
  for (let at = 0; at < connection.sizeBytes; ) {
    const extents = (await connection.blockStatus(at, connection.sizeBytes - at, patience())).get(context) ?? [];
    for (const { offset, length, flags } of extents) {
      expect(offset).toBe(at);
      rows.push([offset, length, flags]);
      at += length;
    }
  }
  return rows;
}

describe("qemu-nbd", () => {
  it("serves data, holes and the tail of an odd size as they are in the file", async (context) => {
    requireTool(context, "qemu-nbd");
    await using folder = await scratchFolder();
    const image = Buffer.alloc(6 * MIB + 512);
    noise(MIB, "a").copy(image, 0);
    noise(MIB + 512, "b").copy(image, 5 * MIB);
    await writeFile(folder.file("disk.raw"), image);
    execFileSync("fallocate", ["--dig-holes", folder.file("disk.raw")]);
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-r", "-t", "-e", "8", "-f", "raw", "-x", "drive-scsi0", "-D", "a disk", "-k", address.path],
      folder.file("disk.raw"),
    ]);
    await using connection = await open(server, "drive-scsi0", [BASE_ALLOCATION]);
    expect(connection).toMatchObject({ sizeBytes: image.length, isReadOnly: true });
    const whole = Buffer.alloc(image.length, 0xee);
    await connection.read(0, whole, patience());
    expect(whole.equals(image)).toBe(true);
    const expected = JSON.parse(
      execFileSync("nbdinfo", ["--map", "--json", `nbd+unix:///drive-scsi0?socket=${address.path}`], {
        encoding: "utf8",
      }),
    ) as Array<{ offset: number; length: number; type: number }>;
    expect(await mapOf(connection, BASE_ALLOCATION)).toEqual(
      expected.map(({ offset, length, type }) => [offset, length, type]),
    );
  });

  it("takes writes, zeroes, trims and flushes", async (context) => {
    requireTool(context, "qemu-nbd", "qemu-img");
    await using folder = await scratchFolder();
    await writeFile(folder.file("disk.raw"), noise(4 * MIB, "old"));
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-t", "-e", "8", "-f", "raw", "--discard=unmap", "-k", address.path],
      folder.file("disk.raw"),
    ]);
    await using connection = await open(server, "", [BASE_ALLOCATION]);
    expect(connection).toMatchObject({ canTrim: true, canWriteZeroes: true, canFlush: true, isReadOnly: false });
    const fresh = noise(64 * KIB, "new");
    await Promise.all([
      connection.write(MIB, fresh, patience()),
      connection.writeZeroes(2 * MIB, 64 * KIB, patience()),
      connection.trim(3 * MIB, MIB, patience()),
    ]);
    await connection.flush(patience());
    const file = await readFile(folder.file("disk.raw"));
    expect(file.subarray(MIB, MIB + 64 * KIB).equals(fresh)).toBe(true);
    expect(file.subarray(2 * MIB, 2 * MIB + 64 * KIB).equals(Buffer.alloc(64 * KIB))).toBe(true);
    const [last] = (await mapOf(connection, BASE_ALLOCATION)).slice(-1);
    expect(last).toEqual([3 * MIB, MIB, AllocationFlag.Hole | AllocationFlag.Zero]);
  });

  it("shows a dirty bitmap that differs from the allocation, under a name with a colon", async (context) => {
    requireTool(context, "qemu-nbd", "qemu-img", "qemu-io");
    await using folder = await scratchFolder();
    const disk = folder.file("disk.qcow2");
    const io = (...commands: string[]): Buffer =>
      execFileSync("qemu-io", ["-f", "qcow2", ...commands.flatMap((command) => ["-c", command]), disk]);
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", disk, "16M"]);
    io("write -P 1 1M 1M", "write -P 2 8M 1M");
    execFileSync("qemu-img", ["bitmap", "--add", "-g", "64k", disk, "snapshot-access:store1"]);
    io("write -P 3 8M 128k", "write -z -u 12M 64k");
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-r", "-t", "-e", "8", "-f", "qcow2", "-B", "snapshot-access:store1", "-x", "d", "-k", address.path],
      disk,
    ]);
    const name = "qemu:dirty-bitmap:snapshot-access:store1";
    await using connection = await open(server, "d", [name, BASE_ALLOCATION, "qemu:dirty-bitmap:other"]);
    expect([...connection.metaContexts].sort()).toEqual([BASE_ALLOCATION, name]);
    const dirty = (await mapOf(connection, name)).filter(([, , flags]) => (flags & DirtyFlag.Dirty) !== 0);
    expect(dirty).toEqual([
      [8 * MIB, 128 * KIB, 1],
      [12 * MIB, 64 * KIB, 1],
    ]);
    const data = (await mapOf(connection, BASE_ALLOCATION)).filter(
      ([, , flags]) => (flags & AllocationFlag.Zero) === 0,
    );
    expect(data).toEqual([
      [MIB, MIB, 0],
      [8 * MIB, MIB, 0],
    ]);
  });

  it("names an export it does not have, over TCP too", async (context) => {
    requireTool(context, "qemu-nbd", "qemu-img");
    await using folder = await scratchFolder();
    await writeFile(folder.file("disk.raw"), noise(64 * KIB, "tcp"));
    const address: NbdAddress = { transport: "tcp", host: "127.0.0.1", port: await freePort() };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-r", "-t", "-e", "8", "-f", "raw", "-x", "there", "-b", "127.0.0.1", "-p", String(address.port)],
      folder.file("disk.raw"),
    ]);
    expect(await failureOf(open(server, "not-there"))).toMatchObject({
      name: "NbdServerError",
      message: expect.stringMatching(/^Cannot open NBD export "not-there": the server has no such export/),
      error: { errno: "NBD_REP_ERR_UNKNOWN" },
    });
    await using connection = await open(server, "there");
    const target = Buffer.alloc(64 * KIB);
    await connection.read(0, target, patience());
    expect(target.equals(noise(64 * KIB, "tcp"))).toBe(true);
  });

  it("killed in the middle fails all that is in flight, once", async (context) => {
    requireTool(context, "qemu-nbd", "qemu-img");
    await using folder = await scratchFolder();
    execFileSync("qemu-img", ["create", "-q", "-f", "raw", folder.file("disk.raw"), "1G"]);
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-r", "-t", "-e", "8", "-f", "raw", "-k", address.path],
      folder.file("disk.raw"),
    ]);
    await using connection = await open(server, "");
    server.child.kill("SIGSTOP");
    const reads = Array.from({ length: 16 }, (_, index) =>
      failureOf(connection.read(index * MIB, Buffer.alloc(MIB), patience())),
    );
    server.child.kill("SIGKILL");
    const failures = await Promise.all(reads);
    expect(failures[0]).toMatchObject({ name: "NbdConnectionError" });
    for (const failure of failures) expect(failure.error).toBe(failures[0]?.error);
  });

  it("stopped is given up with a clear sentence", async (context) => {
    requireTool(context, "qemu-nbd", "qemu-img");
    await using folder = await scratchFolder();
    execFileSync("qemu-img", ["create", "-q", "-f", "raw", folder.file("disk.raw"), "1M"]);
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    await using server = await startNbdServer(address, "qemu-nbd", [
      ...["-r", "-t", "-e", "8", "-f", "raw", "-k", address.path],
      folder.file("disk.raw"),
    ]);
    await using connection = await NbdConnection.open({
      address,
      exportName: "",
      replyTimeoutMs: 300,
      signal: patience(),
    });
    server.child.kill("SIGSTOP");
    const failure = await failureOf(connection.read(0, Buffer.alloc(512), patience()));
    expect(failure.message).toBe(`NBD server at "unix:${address.path}" did not answer for 0.3 s (commands waiting: 1)`);
  });
});

describe("qemu-storage-daemon", () => {
  it("refuses reads outside the dirty ranges of a snapshot-access export, and trims inside", async (context) => {
    requireTool(context, "qemu-storage-daemon", "qemu-img", "qemu-io");
    await using folder = await scratchFolder();
    const disk = folder.file("disk.qcow2");
    const fleecing = folder.file("fleecing.qcow2");
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", disk, "16M"]);
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", fleecing, "16M"]);
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 1 0 16M", disk]);
    execFileSync("qemu-img", ["bitmap", "--add", "-g", "64k", disk, "acc"]);
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 7 4M 64k", "-c", "write -P 8 6M 128k", disk]);
    execFileSync("qemu-img", ["bitmap", "--disable", disk, "acc"]);
    const address: NbdAddress = { transport: "unix", path: folder.file("s") };
    const blockdev = (options: object): string[] => ["--blockdev", JSON.stringify(options)];
    await using server = await startNbdServer(address, "qemu-storage-daemon", [
      ...blockdev({ driver: "qcow2", "node-name": "disk", file: { driver: "file", filename: disk } }),
      ...blockdev({
        driver: "qcow2",
        "node-name": "fl",
        discard: "unmap",
        file: { driver: "file", filename: fleecing, discard: "unmap" },
      }),
      ...blockdev({
        driver: "copy-before-write",
        "node-name": "cbw",
        file: "disk",
        target: "fl",
        bitmap: { node: "disk", name: "acc" },
      }),
      ...blockdev({ driver: "snapshot-access", "node-name": "snap", file: "cbw" }),
      ...["--nbd-server", `addr.type=unix,addr.path=${address.path},max-connections=8`],
      ...[
        "--export",
        JSON.stringify({
          ...{ type: "nbd", id: "e", "node-name": "snap", name: "drive-scsi0", writable: true },
          bitmaps: [{ node: "disk", name: "acc" }],
        }),
      ],
    ]);
    const name = "qemu:dirty-bitmap:acc";
    await using connection = await open(server, "drive-scsi0", [BASE_ALLOCATION, name]);
    expect(connection.blockSize.maximum).toBe(32 * MIB);
    expect(connection.canTrim).toBe(true);
    const target = Buffer.alloc(128 * KIB);
    await connection.read(6 * MIB, target, patience());
    expect(target.equals(Buffer.alloc(128 * KIB, 8))).toBe(true);
    expect(await failureOf(connection.read(0, target, patience()))).toMatchObject({
      name: "NbdServerError",
      message: expect.stringMatching(/^Cannot read 131072 bytes at 0: the NBD server answers EINVAL/),
      error: { errno: "EINVAL" },
    });
    await connection.trim(4 * MIB, 64 * KIB, patience());
    await connection.read(6 * MIB, target, patience());
    expect(target[0]).toBe(8);
  });
});
