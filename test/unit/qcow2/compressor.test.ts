// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { mkdirSync, symlinkSync, unlinkSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { inflateRawSync } from "node:zlib";
import { type BuildOptions, build } from "esbuild";
import { describe, expect, it } from "vitest";
import { AlignedPool } from "../../../src/block/index.ts";
import { createCompressor } from "../../../src/qcow2/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { MIB, randomBytes, scratchDir, textBytes } from "../../support/qcow2/qcow2-images.ts";

const { signal } = new AbortController();
const CLUSTER = 65536;
const root = fileURLToPath(new URL("../../../", import.meta.url));

describe("createCompressor()", () => {
  it("makes zlib streams that inflate with QEMU's window of 4 KiB", async () => {
    await using compressor = await createCompressor("zlib", 2);
    const input = Buffer.concat([textBytes(CLUSTER, 1), randomBytes(CLUSTER, 2), textBytes(CLUSTER, 3)]);
    const run = await compressor.compress(input, CLUSTER, signal);
    expect(run.sizes[1]).toBe(0);
    let at = 0;
    for (const index of [0, 2]) {
      const size = run.sizes[index] as number;
      const plain = inflateRawSync(Buffer.from(run.bytes.subarray(at, at + size)), { windowBits: 12 });
      expect(plain.equals(input.subarray(index * CLUSTER, (index + 1) * CLUSTER))).toBe(true);
      at += size;
    }
    run.release();
  });

  it("makes zstd streams that the zstd program reads, of shared memory in place", async (context) => {
    requireTool(context, "zstd");
    await using compressor = await createCompressor("zstd", 1);
    const { bytes } = await new AlignedPool(MIB, 2).acquire(signal);
    textBytes(MIB, 5).copy(bytes);
    const run = await compressor.compress(bytes, CLUSTER, signal);
    const streams = Buffer.from(
      run.bytes.subarray(
        0,
        run.sizes.reduce((sum, size) => sum + size),
      ),
    );
    expect(execFileSync("zstd", ["-dc"], { input: streams, maxBuffer: 2 * MIB }).equals(textBytes(MIB, 5))).toBe(true);
  });

  it("fills a short last cluster with zeroes", async () => {
    await using compressor = await createCompressor("zlib", 1);
    const run = await compressor.compress(Buffer.alloc(512, 7), CLUSTER, signal);
    const plain = inflateRawSync(Buffer.from(run.bytes.subarray(0, run.sizes[0])));
    expect(plain.equals(Buffer.concat([Buffer.alloc(512, 7), Buffer.alloc(CLUSTER - 512)]))).toBe(true);
  });

  it("waits for a released result when all are taken, and stops waiting at an abort", async () => {
    await using compressor = await createCompressor("zlib", 1);
    const runs = [];
    for (let index = 0; index < 5; index++)
      runs.push(await compressor.compress(Buffer.alloc(CLUSTER, 1), CLUSTER, signal));
    const controller = new AbortController();
    const waiting = compressor.compress(Buffer.alloc(CLUSTER, 1), CLUSTER, controller.signal);
    const next = compressor.compress(Buffer.alloc(CLUSTER, 1), CLUSTER, signal);
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(waiting).rejects.toBe(reason);
    runs[0]?.release();
    expect((await next).sizes.length).toBe(1);
  });

  it("rejects what is running when it is disposed", async () => {
    const compressor = await createCompressor("zlib", 1);
    const running = compressor.compress(randomBytes(MIB, 1), CLUSTER, signal);
    const rejected = expect(running).rejects.toThrow(/a worker failed: it ended with code 1|is closed/);
    await compressor[Symbol.asyncDispose]();
    await compressor[Symbol.asyncDispose]();
    await rejected;
    await expect(compressor.compress(Buffer.alloc(CLUSTER), CLUSTER, signal)).rejects.toThrow();
  });

  it("ends for good when a worker fails, with one clear sentence", async () => {
    await using compressor = await createCompressor("zlib", 2);
    // A buffer that lies about where it begins: the worker cannot make a view of it.
    const lying = Buffer.from(new SharedArrayBuffer(CLUSTER));
    Object.defineProperty(lying, "byteOffset", { value: 2 ** 30 });
    const message = /^Cannot compress: a worker failed: /;
    await expect(compressor.compress(lying, CLUSTER, signal)).rejects.toThrow(message);
    await expect(compressor.compress(Buffer.alloc(CLUSTER), CLUSTER, signal)).rejects.toThrow(message);
  });
});

describe("createCompressor() in a bundle", () => {
  const program = `import { createCompressor } from "${root}src/qcow2/index.ts";
    try { await (await createCompressor("zstd", 1))[Symbol.asyncDispose](); process.stdout.write("works"); }
    catch (error) { process.stdout.write(error.message + " | " + error.hint); }`;

  async function bundleIn(folder: string): Promise<string> {
    const shared = { bundle: true, platform: "node", external: ["koffi"], logLevel: "error" } satisfies BuildOptions;
    const outfile = `${folder}/program.mjs`;
    await build({ ...shared, stdin: { contents: program, resolveDir: root }, format: "esm", outfile });
    await build({
      ...shared,
      entryPoints: [`${root}src/qcow2/compress-worker.ts`],
      format: "cjs",
      outfile: `${folder}/compress-worker.cjs`,
    });
    mkdirSync(`${folder}/node_modules`);
    symlinkSync(`${root}node_modules/koffi`, `${folder}/node_modules/koffi`);
    return outfile;
  }

  it("finds its worker beside the bundle, and says what to do where libzstd is missing", async () => {
    using dir = scratchDir();
    const outfile = await bundleIn(dir.path);
    expect(execFileSync(process.execPath, [outfile], { encoding: "utf8", cwd: "/" })).toBe("works");
    // Not by a broken libzstd in LD_LIBRARY_PATH: Debian 13's Node itself is linked with it.
    unlinkSync(`${path.dirname(outfile)}/node_modules/koffi`);
    const said = execFileSync(process.execPath, [outfile], { encoding: "utf8", cwd: "/" });
    expect(said).toMatch(/^Cannot compress with zstd: libzstd.so.1 does not load .*set dir-compression to zlib$/);
  });
});
