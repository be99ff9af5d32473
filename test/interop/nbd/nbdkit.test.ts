// SPDX-License-Identifier: AGPL-3.0-or-later
// The client against nbdkit, whose plugins and filters make every kind of server.
import { writeFile } from "node:fs/promises";
import { describe, expect, it, type TestContext } from "vitest";
import type { NbdAddress } from "../../../src/nbd/address.ts";
import { AllocationFlag, BASE_ALLOCATION, NbdConnection } from "../../../src/nbd/index.ts";
import { failureOf, patience } from "../../support/nbd/nbd-client.ts";
import { freePort, type NbdServer, scratchFolder, startNbdServer } from "../../support/nbd/nbd-servers.ts";
import { requireTool } from "../../support/programs/tools.ts";

const KIB = 1024;
const MIB = 1024 * KIB;

interface Nbdkit extends AsyncDisposable {
  readonly server: NbdServer;
  readonly address: NbdAddress;
}

async function nbdkit(context: TestContext, args: readonly string[], tcpPort?: number): Promise<Nbdkit> {
  requireTool(context, "nbdkit");
  const folder = await scratchFolder();
  const address: NbdAddress =
    tcpPort === undefined
      ? { transport: "unix", path: folder.file("s") }
      : { transport: "tcp", host: "127.0.0.1", port: tcpPort };
  const place = address.transport === "unix" ? ["-U", address.path] : ["-i", "127.0.0.1", "-p", String(address.port)];
  const server = await startNbdServer(address, "nbdkit", ["-f", ...place, ...args]);
  return {
    server,
    address,
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      await folder[Symbol.asyncDispose]();
    },
  };
}

const open = (kit: Nbdkit, exportName = "", metaContexts: readonly string[] = []): Promise<NbdConnection> =>
  NbdConnection.open({ address: kit.address, exportName, metaContexts, signal: patience() });

/** The pattern plugin: every 8 bytes hold their own offset, big-endian. */
function pattern(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; at += 8) bytes.writeBigUInt64BE(BigInt(offset + at), at);
  return bytes;
}

describe("nbdkit", () => {
  it("answers 64 reads at once, each into its own buffer, over TCP", async (context) => {
    await using kit = await nbdkit(context, ["pattern", "1T"], await freePort());
    await using connection = await open(kit);
    expect(connection.sizeBytes).toBe(2 ** 40);
    const offsets = Array.from({ length: 64 }, (_, index) => index * 16_000_000_000 + 8 * index);
    await Promise.all(
      offsets.map(async (offset) => {
        const target = Buffer.alloc(256 * KIB);
        await connection.read(offset, target, patience());
        expect(target.equals(pattern(offset, target.length)), `at ${offset}`).toBe(true);
      }),
    );
  });

  it("answers in simple replies where structured ones are off", async (context) => {
    await using kit = await nbdkit(context, ["--no-sr", "pattern", "64M"]);
    await using connection = await open(kit, "", [BASE_ALLOCATION]);
    expect(connection.metaContexts).toEqual([]);
    const targets = [0, 8 * MIB, 40 * MIB].map((offset) => ({ offset, target: Buffer.alloc(MIB) }));
    await Promise.all(targets.map(({ offset, target }) => connection.read(offset, target, patience())));
    for (const { offset, target } of targets) expect(target.equals(pattern(offset, MIB))).toBe(true);
  });

  it("gets requests within its block sizes, where it fails all others", async (context) => {
    await using kit = await nbdkit(context, [
      ...["--filter=blocksize-policy", "pattern", "16M"],
      ...[
        "blocksize-minimum=4096",
        "blocksize-preferred=64k",
        "blocksize-maximum=128k",
        "blocksize-error-policy=error",
      ],
    ]);
    await using connection = await open(kit);
    expect(connection.blockSize).toEqual({ minimum: 4096, preferred: 64 * KIB, maximum: 128 * KIB });
    const target = Buffer.alloc(MIB + 4096);
    await connection.read(4096, target, patience());
    expect(target.equals(pattern(4096, target.length))).toBe(true);
    expect((await failureOf(connection.read(512, Buffer.alloc(512), patience()))).code).toBe("INVALID_PARAMS");
  });

  it("tells data from holes", async (context) => {
    await using kit = await nbdkit(context, ["data", "data=@65536 1 @131072 0*65536", "size=4M"]);
    await using connection = await open(kit, "", [BASE_ALLOCATION]);
    const extents = (await connection.blockStatus(0, 4 * MIB, patience())).get(BASE_ALLOCATION) ?? [];
    const hole = AllocationFlag.Hole | AllocationFlag.Zero;
    expect(extents[0]?.flags).toBe(hole);
    expect(extents.at(-1)?.flags).toBe(hole);
    const data = extents.find(({ flags }) => flags === 0);
    expect(data?.offset).toBeLessThanOrEqual(65_536);
    expect((data?.offset ?? 0) + (data?.length ?? 0)).toBeGreaterThan(65_536);
  });

  it.for(["EIO", "EINVAL", "ENOMEM", "ESHUTDOWN"])(
    "fails reads with %s, and the connection lives on",
    async (error, context) => {
      await using kit = await nbdkit(context, [
        "--filter=error",
        "memory",
        "1M",
        `error-pread=${error}`,
        "error-pread-rate=100%",
      ]);
      await using connection = await open(kit);
      for (let round = 0; round < 2; round++) {
        const failure = await failureOf(connection.read(0, Buffer.alloc(512), patience()));
        expect(failure).toMatchObject({ name: "NbdServerError", error: { errno: error } });
      }
      await connection.write(0, Buffer.alloc(512, 1), patience());
    },
  );

  it("keeps what was written, and zeroes what was zeroed", async (context) => {
    await using kit = await nbdkit(context, ["memory", "128M"]);
    await using connection = await open(kit, "", [BASE_ALLOCATION]);
    const bytes = pattern(3, 80 * MIB); // beyond the 32 MiB of one request
    await connection.write(MIB, bytes, patience());
    await connection.writeZeroes(2 * MIB, MIB, patience());
    await connection.flush(patience());
    bytes.fill(0, MIB, 2 * MIB);
    const target = Buffer.alloc(bytes.length, 0xff);
    await connection.read(MIB, target, patience());
    expect(target.equals(bytes)).toBe(true);
  });

  it("is refused where it speaks only the oldstyle negotiation", async (context) => {
    await using kit = await nbdkit(context, ["-o", "memory", "1M"]);
    expect(await failureOf(open(kit))).toMatchObject({
      name: "NbdProtocolError",
      message: expect.stringMatching(/oldstyle/),
    });
  });

  it("is refused where it requires no fixed newstyle", async (context) => {
    await using kit = await nbdkit(context, ["--mask-handshake=0", "memory", "1M"]);
    expect(await failureOf(open(kit))).toMatchObject({ code: "NOT_SUPPORTED" });
  });

  it("opens one of several exports", async (context) => {
    await using folder = await scratchFolder();
    await writeFile(folder.file("a"), Buffer.alloc(512, 1));
    await writeFile(folder.file("b c"), Buffer.alloc(1024, 2));
    await using kit = await nbdkit(context, ["file", `dir=${folder.path}`]);
    await using connection = await open(kit, "b c");
    const target = Buffer.alloc(1024);
    await connection.read(0, target, patience());
    expect(target.equals(Buffer.alloc(1024, 2))).toBe(true);
  });
});
