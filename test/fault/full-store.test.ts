// SPDX-License-Identifier: AGPL-3.0-or-later
// A small file system that really fills up: in the middle of an image, and then page by page up to the size that is
// just enough, so that it is full at the manifest, at the state, at the notes and at the log.
// biome-ignore assist/source/organizeImports: it must come before the product
import { FaultSite, MOST_POINTS } from "../support/fault/fault-job.ts";
import { execFileSync } from "node:child_process";
import { rm, statfs, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { ContainerNode } from "../support/container/container-node.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const PAGE = 4 * KIB;

/** A tmpfs over the store until disposed. */
class SmallStore implements Disposable {
  readonly #folder: string;

  constructor(folder: string, sizeBytes: number) {
    this.#folder = folder;
    execFileSync("mount", ["-t", "tmpfs", "-o", `size=${sizeBytes}`, "tmpfs", folder], { stdio: "pipe" });
  }

  /** Leaves so many bytes, rounded down to pages; "all" gives the room back. */
  async leave(bytes: number | "all"): Promise<void> {
    const filler = path.join(this.#folder, "filler");
    await rm(filler, { force: true });
    if (bytes === "all") return;
    const { bavail, bsize } = await statfs(this.#folder);
    const taken = bavail * bsize - Math.floor(bytes / PAGE) * PAGE;
    await writeFile(filler, "");
    if (taken > 0) execFileSync("fallocate", ["-l", String(taken), filler]);
  }

  [Symbol.dispose](): void {
    execFileSync("umount", ["--lazy", this.#folder]);
  }
}

/** Plays one backup with so much room. @returns whether it was made, and what the error was about */
async function backUpWithin(site: FaultSite, store: SmallStore, bytes: number): Promise<{ made: boolean; at: string }> {
  await site.write("drive-scsi0", 2 * MIB, seededBytes(bytes, MIB)); // always the same amount
  await store.leave(bytes);
  const cell = await site.vzdump();
  const text = [String((cell.error as Error | undefined)?.message ?? ""), ...cell.log].join("\n");
  if (cell.error !== undefined) expect((cell.error as Error).message).toMatch(/\(ENOSPC\)$/);
  expect(await site.expectWhole(cell)).toEqual([]);
  await store.leave("all");
  return { made: cell.isCommitted, at: /([\w.-]+)": no space left/.exec(text)?.[1] ?? "" };
}

describe("a store of which only so much is free", () => {
  it.each([
    { scfg: { "dir-compression": "none" }, name: "incremental" },
    { scfg: { "dir-compression": "zstd", "vm-backup-mode": "full" }, name: "full, compressed" },
  ])("takes a whole backup or none, page by page ($name)", { timeout: 300_000 }, async ({ name, scfg }) => {
    await using site = await FaultSite.create(scfg);
    using store = new SmallStore(site.node.storePath, 96 * MIB);
    await site.startAgain();
    const places = new Set<string>();
    let failed = 0;
    let bytes = 0;
    // The coarse steps find out about where it is enough; page by page it goes on until nothing is missing at all.
    for (const step of [256 * KIB, 32 * KIB, PAGE]) {
      for (let isEnough = false; !isEnough; bytes += step) {
        const { at, made } = await backUpWithin(site, store, bytes);
        places.add(at);
        if (!made) failed++;
        // A chain that grows needs more room, and so does a guest that writes more.
        else if (name === "incremental" || site.points.size > MOST_POINTS) await site.startAgain();
        expect(bytes).toBeLessThan(16 * MIB);
        isEnough = made && (step > PAGE || at === "");
      }
      bytes = Math.max(0, bytes - 2 * step);
    }
    expect(failed).toBeGreaterThan(8);
    for (const place of ["drive-scsi0.qcow2", "manifest.json", "attributes.json", ""]) expect(places).toContain(place);
    await site.expectNextBackup("all");
  });
});

describe("a container's backup on a store of which only so much is free", () => {
  it.each(["tar", "squashfs"])("fails in one sentence and leaves nothing (%s)", { timeout: 300_000 }, async (mode) => {
    await using node = await ContainerNode.create({ "lxc-backup-mode": mode, "dir-compression": "zstd" });
    using store = new SmallStore(node.storePath, 24 * MIB);
    let failed = 0;
    let isDone = false;
    for (let bytes = 0; !isDone; bytes += bytes === 0 ? 8 * KIB : 24 * KIB) {
      await store.leave(bytes);
      const { output, status } = await (await node.vzdump()).result;
      isDone = status === 0;
      if (!isDone) {
        failed++;
        expect(output).toMatch(/^ERROR: .*Cannot [^\n]*no space left on( the)? device/im);
        expect(output).not.toMatch(/undefined|Internal error/);
        expect(await node.points()).toEqual([]);
      }
      await store.leave("all");
    }
    expect(failed).toBeGreaterThan(2);
    const [volname = "none"] = await node.points();
    const restored = await (await node.restore(volname, path.join(node.dir, "restored"))).result;
    expect(restored.status, restored.output).toBe(0);
  });
});
