// SPDX-License-Identifier: AGPL-3.0-or-later
// Whole backups of one container with a fault somewhere, as seen by the root process that owns the store, and what
// must hold after each. The test plays the archiver.
// biome-ignore assist/source/organizeImports: it must come before the product
import { type Fault, faultSwitch, type Operation } from "./fault-fs.ts";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { expect } from "vitest";
import { runTool } from "../../../fixtures/lab/index.ts";
import { handoffOf } from "../container/archiver.ts";
import { takeHandoff } from "../container/take-handoff.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { leftBelow, MemoryFolder } from "./fault-folder.ts";
import { expectSentence, sentenceOf } from "./fault-rules.ts";

const VMID = 101;
/** Above this it starts again with an empty store: each point is read after every cell. */
const MOST_POINTS = 12;
const never = new AbortController().signal;
export const CONFIG = Buffer.from("hostname: ct\n");
export const FIREWALL = Buffer.from("[OPTIONS]\n");
const COMMIT = { commit: { files: 13, bytes: 100, warnings: 0, "guest-config": CONFIG.toString("base64") } };

/** What both tar and squashfs preserve on any file system. */
const MAKE_TREE = `
set -e
mkdir -p "$1/sbin" "$1/home/u"; cd "$1"
for n in $(seq 0 9); do echo "file $n" > f$n; done
ln f0 sbin/hard; ln -s f1 sym; mkfifo home/fifo; truncate -s 100K home/u/sparse; echo end >> home/u/sparse
echo x > "home/u/odd name \\"'\\$;é"
chown -R 1000:1001 home/u; chown 0:42 f2; chmod 4750 f3; chmod 700 home; touch -d 2001-02-03T04:05:06 f4
`;

interface ContainerOutcome {
  readonly message: string | undefined;
  readonly isCommitted: boolean;
  /** What failed first; undefined if the job ended before the fault. */
  readonly fired: Operation | undefined;
  readonly operations: readonly Operation[];
}

/** A store, a container's files and an archive of them, and the points that must exist. */
export class ContainerSite implements AsyncDisposable {
  readonly dir: string;
  /** The entries of the container. */
  readonly tree: string;
  readonly archive: string;
  readonly points = new Set<string>();
  readonly log: string[] = [];
  readonly #memory: MemoryFolder;
  readonly #mode: "tar" | "squashfs";
  #epoch = 1000;

  private constructor(dir: string, mode: "tar" | "squashfs", memory: MemoryFolder) {
    this.#memory = memory;
    this.dir = dir;
    this.tree = path.join(dir, "tree");
    this.archive = path.join(dir, "made-archive");
    this.#mode = mode;
  }

  static async create(mode: "tar" | "squashfs"): Promise<ContainerSite> {
    const memory = await MemoryFolder.mount();
    const dir = await memory.use(() => mkdtemp(path.join(tmpdir(), "pbh-nth-ct-")));
    const site = new ContainerSite(dir, mode, memory);
    for (const name of ["store", "root/etc/pve/priv", "root/run"]) {
      await mkdir(path.join(site.dir, name), { recursive: true });
    }
    await runTool("bash", ["-c", MAKE_TREE, "-", site.tree]);
    if (mode === "tar") await runTool("tar", ["cf", site.archive, "-C", site.tree, "."]);
    else await runTool("mksquashfs", [site.tree, site.archive, "-noappend", "-no-progress", "-quiet"]);
    return site;
  }

  /** The store, the place of the witness, and the directory for mounts and sockets. */
  get folders(): string[] {
    const root = path.join(this.dir, "root");
    return [path.join(this.dir, "store"), path.join(root, "etc/pve/priv/pve-backup-host"), this.runDir];
  }

  get runDir(): string {
    return path.join(this.dir, "root/run/pve-backup-host");
  }

  get newest(): string {
    return [...this.points].at(-1) ?? "none";
  }

  provider(): DirectoryProvider {
    const scfg = { path: path.join(this.dir, "store"), "dir-compression": "none", "lxc-backup-mode": this.#mode };
    const log = (level: string, text: string): void => void this.log.push(`${level}: ${text}`);
    const fileHandles = { nextDirtyRegions: () => Promise.reject(), deallocate: () => Promise.reject() };
    const context = { storeid: "bk", scfg, nodename: "node1", log, fileHandles };
    return new DirectoryProvider(context, { root: path.join(this.dir, "root") });
  }

  async vzdump(fault?: Fault): Promise<ContainerOutcome> {
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

  /** PVE's calls; the error of backup_container arrives over the socket, as text. */
  async #job(epoch: number): Promise<Pick<ContainerOutcome, "message" | "isCommitted">> {
    await using provider = this.provider();
    let isCommitted = false;
    let message: string | undefined;
    try {
      await provider.backup.jobInit();
      await provider.backup.backupInit(VMID, "lxc", epoch, never);
      const info = { directory: this.tree, sources: ["./"], backupUserId: 100_000, bandwidthLimit: 0 };
      const handoff = handoffOf(
        await provider.backup.backupContainerPrepare(VMID, { ...info, firewallConfig: FIREWALL }, never),
      );
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
      if (isCommitted) await provider.backup.backupCleanup(VMID, "lxc", true, undefined, never);
    } catch (error) {
      message = sentenceOf(error);
    }
    if (message !== undefined) await provider.backup.backupCleanup(VMID, "lxc", false, message, never);
    await provider.backup.backupHandleLogFile(VMID, path.join(this.dir, "task.log"));
    await provider.backup.jobCleanup(never);
    return { message, isCommitted };
  }

  /** What must hold after every cell. @returns what is left for the next backup */
  async expectWhole({ message }: ContainerOutcome): Promise<string[]> {
    if (message !== undefined) expectSentence(message);
    await using provider = this.provider();
    const listed = await provider.storage.listVolumes(VMID, never);
    expect(new Set(listed.map(({ volname }) => volname))).toEqual(this.points);
    const expected = await readFile(this.archive);
    for (const volname of this.points) {
      const folder = path.join(this.dir, "store", volname.replace("backup/", ""));
      const name = this.#mode === "tar" ? "archive.tar" : "archive.sqfs";
      expect(expected.equals(await readFile(path.join(folder, name))), volname).toBe(true);
      expect(await provider.restore.archiveGetGuestConfig(volname, never)).toEqual(CONFIG);
    }
    return await leftBelow(this.folders);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    faultSwitch.disarm();
    await this.#memory[Symbol.asyncDispose]();
  }
}
