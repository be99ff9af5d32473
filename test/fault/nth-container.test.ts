// SPDX-License-Identifier: AGPL-3.0-or-later
// One whole backup of a container, as the process of root that owns the store sees it: each of its operations on the
// store and on the folder of its socket fails. The test plays the archiver; what that one writes to a full disk is in
// full-store.test.ts.
// biome-ignore assist/source/organizeImports: it must come before the product
import {
  errnosFor,
  type Fault,
  faultSwitch,
  type Operation,
  PLAY_ALL,
  type Step,
  stepsOf,
} from "../support/fault-fs.ts";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { describe, expect, it, onTestFailed } from "vitest";
import { toRpcError } from "../../bridge/error-map.ts";
import { runTool } from "../../fixtures/lab/index.ts";
import { takeHandoff } from "../../src/provider/container-handoff.ts";
import { DirectoryProvider } from "../../src/provider/index.ts";
import { age, endOwners, leftBelow, MemoryFolder } from "../support/fault-folder.ts";
import { requireTool } from "../support/tools.ts";

const TIMEOUT_MS = PLAY_ALL ? 3_600_000 : 600_000;
const VMID = 101;
/** Above this it starts again with an empty store: each of them is read after every cell. */
const MOST_POINTS = 12;
const never = new AbortController().signal;
const CONFIG = Buffer.from("hostname: ct\n");
const COMMIT = { commit: { files: 13, bytes: 100, warnings: 0, "guest-config": CONFIG.toString("base64") } };

interface Outcome {
  readonly message: string | undefined;
  readonly isCommitted: boolean;
  readonly fired: Operation | undefined;
  readonly operations: readonly Operation[];
}

class Site implements AsyncDisposable {
  readonly dir: string;
  readonly archive: string;
  readonly points = new Set<string>();
  readonly log: string[] = [];
  readonly #memory: MemoryFolder;
  readonly #mode: "tar" | "squashfs";
  #epoch = 1000;

  private constructor(dir: string, mode: "tar" | "squashfs", memory: MemoryFolder) {
    this.#memory = memory;
    this.dir = dir;
    this.archive = path.join(dir, "made-archive");
    this.#mode = mode;
  }

  static async create(mode: "tar" | "squashfs"): Promise<Site> {
    const memory = await MemoryFolder.mount();
    const dir = await memory.use(() => mkdtemp(path.join(tmpdir(), "pbh-nth-ct-")));
    const site = new Site(dir, mode, memory);
    const tree = path.join(site.dir, "tree");
    for (const name of ["store", "root/etc/pve/priv", "root/run", "tree/sbin"]) {
      await mkdir(path.join(site.dir, name), { recursive: true });
    }
    for (let n = 0; n < 10; n++) await writeFile(path.join(tree, `f${n}`), `file ${n}\n`);
    if (mode === "tar") await runTool("tar", ["cf", site.archive, "-C", tree, "."]);
    else await runTool("mksquashfs", [tree, site.archive, "-noappend", "-no-progress", "-quiet"]);
    return site;
  }

  get folders(): string[] {
    const root = path.join(this.dir, "root");
    return [path.join(this.dir, "store"), path.join(root, "etc/pve/priv/pve-backup-host"), this.runDir];
  }

  get runDir(): string {
    return path.join(this.dir, "root/run/pve-backup-host");
  }

  provider(): DirectoryProvider {
    const scfg = { path: path.join(this.dir, "store"), "dir-compression": "none", "lxc-backup-mode": this.#mode };
    const log = (level: string, text: string): void => void this.log.push(`${level}: ${text}`);
    const fileHandles = { nextDirtyRegions: () => Promise.reject(), deallocate: () => Promise.reject() };
    const context = { storeid: "bk", scfg, nodename: "node1", apiver: 15, log, fileHandles };
    return new DirectoryProvider(context, { root: path.join(this.dir, "root") });
  }

  async vzdump(fault?: Fault): Promise<Outcome> {
    this.log.length = 0;
    if (this.points.size > MOST_POINTS) {
      await rm(path.join(this.dir, "store", String(VMID)), { recursive: true });
      this.points.clear();
    }
    const epoch = this.#epoch++;
    await writeFile(path.join(this.dir, "task.log"), "INFO: task log\n");
    faultSwitch.arm(this.folders, fault);
    const { isCommitted, message } = await this.#job(epoch).finally(() => faultSwitch.disarm());
    if (isCommitted) this.points.add(`backup/${VMID}/lxc-${epoch}`);
    return { message, isCommitted, fired: faultSwitch.fired, operations: [...faultSwitch.operations] };
  }

  /** PVE's calls; the error of backup_container comes over the socket, as text. */
  async #job(epoch: number): Promise<Pick<Outcome, "message" | "isCommitted">> {
    await using provider = this.provider();
    let isCommitted = false;
    let message: string | undefined;
    try {
      await provider.jobInit();
      await provider.backupInit(VMID, "lxc", epoch, never);
      const info = {
        directory: path.join(this.dir, "tree"),
        sources: ["./"],
        backupUserId: 100_000,
        bandwidthLimit: 0,
      };
      const firewallConfig = Buffer.from("[OPTIONS]\n");
      const handoff = await provider.backupContainerPrepare(VMID, { ...info, firewallConfig }, never);
      using channel = await takeHandoff(handoff.socketPath, handoff.token);
      await runTool("sh", ["-c", 'cat "$1" > "$2"', "-", this.archive, handoff.archivePath]);
      channel.send(COMMIT);
      for (let isOver = false; !isOver; ) {
        const answer = await channel.next();
        isOver = answer === undefined || !("log" in answer);
        isCommitted = answer?.ok === true;
        if (isOver && !isCommitted) {
          message = (answer?.error as { message: string } | undefined)?.message ?? "no answer";
        }
      }
      if (isCommitted) await provider.backupCleanup(VMID, "lxc", true, undefined, never);
    } catch (error) {
      const { data, message: text } = toRpcError(error);
      expect(data.code).not.toBe("INTERNAL");
      message = text;
    }
    if (message !== undefined) await provider.backupCleanup(VMID, "lxc", false, message, never);
    await provider.backupHandleLogFile(VMID, path.join(this.dir, "task.log"));
    await provider.jobCleanup(never);
    return { message, isCommitted };
  }

  /** What must hold after every cell. @returns what is left for the next backup */
  async expectWhole({ message }: Outcome): Promise<string[]> {
    if (message !== undefined) {
      expect(message).toMatch(/^Cannot [^\n]*[^:\s]$/);
      expect(message).not.toMatch(/undefined|\[object|injected/);
    }
    await using provider = this.provider();
    const listed = await provider.listVolumes(VMID, never);
    expect(new Set(listed.map(({ volname }) => volname))).toEqual(this.points);
    const expected = await readFile(this.archive);
    for (const volname of this.points) {
      const folder = path.join(this.dir, "store", volname.replace("backup/", ""));
      const name = this.#mode === "tar" ? "archive.tar" : "archive.sqfs";
      expect(expected.equals(await readFile(path.join(folder, name))), volname).toBe(true);
      expect(await provider.archiveGetGuestConfig(volname, never)).toEqual(CONFIG);
    }
    return await leftBelow(this.folders);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    faultSwitch.disarm();
    await this.#memory[Symbol.asyncDispose]();
  }
}

/** What is done and fails all the same is a case of its own where the product looks whether it was done. */
const isOdd = ({ kind }: Step, flavour: Fault["flavour"]): boolean =>
  flavour === "after" && (kind === "link" || kind === "rename");

/** What could not be removed waits for the next backup; everything else is gone at once. */
const mayStay = ({ kind }: Step): boolean => kind === "unlink" || kind === "rmdir";

describe.each(["tar", "squashfs"] as const)("a container's backup as %s", (mode) => {
  it.for<[Fault["flavour"], number]>([
    ["before", 1],
    ["after", 2],
    ["onwards", 3],
    ["short", 1],
  ])("is whole or not there when its Nth operation fails (%s)", { timeout: TIMEOUT_MS }, async (how, context) => {
    requireTool(context, "tar", "mksquashfs");
    const flavour = how[0];
    const every = mode === "tar" ? how[1] : 2 * how[1]; // the store does the same for both
    await using site = await Site.create(mode);
    const clean = await site.vzdump();
    expect(clean.message).toBeUndefined();
    const steps = stepsOf(clean.operations).filter(({ kind }) => kind === "write" || flavour !== "short");
    expect(steps.length).toBeGreaterThan(flavour === "short" ? 7 : 50);
    let cell = "";
    onTestFailed(() => console.info(cell, site.log));
    for (const at of steps.filter((step, index) => PLAY_ALL || isOdd(step, flavour) || index % every === 0)) {
      for (const errno of errnosFor(at.kind)) {
        cell = `${flavour} ${errno}: ${at.occurrence}. ${at.name}`;
        const outcome = await site.vzdump({ at, errno, flavour });
        expect(outcome.fired).toBeDefined();
        const left = await site.expectWhole(outcome);
        // A lock that was taken and a backup that became visible are looked for: a lost reply does not matter.
        if (flavour === "after" && /^link|^rename .*lxc-\*$/.test(at.name)) expect(outcome.message).toBeUndefined();
        if (flavour === "before" && !mayStay(at)) expect(left).toEqual([]);
        if (left.length === 0) continue;
        await age(left);
        await endOwners(site.runDir);
        const next = await site.vzdump();
        expect(next.message).toBeUndefined();
        expect(await site.expectWhole(next)).toEqual([]);
      }
    }
    const last = await site.vzdump();
    expect([last.message, last.isCommitted]).toEqual([undefined, true]);
    await site.expectWhole(last);
  });
});
