// SPDX-License-Identifier: AGPL-3.0-or-later
// The hooks of a backup job, called on the provider in this process, or through the real shim under perl -T and the
// real bridge behind it. Both reject with the error that PVE would see.
import type { ChildProcessWithoutNullStreams } from "node:child_process";
import { writeFile } from "node:fs/promises";
import path from "node:path";
import { type LabBackup, until, vmVolumesOf } from "../../../fixtures/lab/index.ts";
import type { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import type { GuestType, HandleToOpen } from "../../../src/provider/index.ts";
import { packTree, playArchiver } from "../container/archiver.ts";
import type { TestNode } from "../node/test-node.ts";
import { processesNaming } from "../programs/processes.ts";
import type { ScriptOptions } from "../programs/scripted-pve.ts";
import { PerlCalls } from "../provider/perl-calls.ts";
import { never } from "../vm/vm-rules.ts";

type Volumes = LabBackup["volumes"];
type Sizes = ReadonlyMap<string, { readonly size: number }>;

interface CopyOptions {
  readonly bandwidthLimit?: number;
  /** Resolves when PVE's signal handler is to die. */
  readonly interrupt?: Promise<void>;
}

export interface Hooks extends AsyncDisposable {
  jobInit(): Promise<void>;
  jobCleanup(): Promise<void>;
  /** @returns the archive name */
  backupInit(vmid: number, type: GuestType, epoch: number): Promise<string>;
  mechanism(vmid: number, type: GuestType): Promise<void>;
  query(vmid: number, devices: Sizes): Promise<Record<string, "new" | "use">>;
  backupVm(vmid: number, config: string, volumes: Volumes, options?: CopyOptions): Promise<void>;
  prepare(vmid: number, tree: string): Promise<void>;
  /** Called after prepare(); reads the files in the tree. */
  backupContainer(vmid: number, tree: string, options?: CopyOptions): Promise<void>;
  cleanup(vmid: number, type: GuestType | undefined, success: boolean, error?: string): Promise<void>;
  logFile(vmid: number, file: string): Promise<void>;
}

/** The provider itself; the archiver in the container's namespace is played by GNU tar and this class. */
export class ProviderHooks implements Hooks {
  readonly #provider: DirectoryProvider;
  #handoff: readonly HandleToOpen[] | undefined;

  constructor(node: TestNode) {
    this.#provider = node.provider();
  }

  async jobInit(): Promise<void> {
    await this.#provider.backup.jobInit();
  }

  async jobCleanup(): Promise<void> {
    await this.#provider.backup.jobCleanup(never);
  }

  async backupInit(vmid: number, type: GuestType, epoch: number): Promise<string> {
    return (await this.#provider.backup.backupInit(vmid, type, epoch, never)).archiveName;
  }

  async mechanism(vmid: number, type: GuestType): Promise<void> {
    await this.#provider.backup.backupGetMechanism(vmid, type);
  }

  async query(vmid: number, devices: Sizes): Promise<Record<string, "new" | "use">> {
    return Object.fromEntries(await this.#provider.backup.backupVmQueryIncremental(vmid, devices, never));
  }

  async backupVm(vmid: number, config: string, volumes: Volumes, options: CopyOptions = {}): Promise<void> {
    const cancel = new AbortController();
    void options.interrupt?.then(() => cancel.abort(new Error("interrupted by signal")));
    const info = { bandwidthLimit: options.bandwidthLimit ?? 0, firewallConfig: undefined };
    await this.#provider.backup.backupVm(vmid, Buffer.from(config), vmVolumesOf(volumes), info, cancel.signal);
  }

  async prepare(vmid: number, tree: string): Promise<void> {
    const info = { directory: tree, sources: ["./"], backupUserId: 0, bandwidthLimit: 0, firewallConfig: undefined };
    this.#handoff = await this.#provider.backup.backupContainerPrepare(vmid, info, never);
  }

  async backupContainer(_vmid: number, tree: string, options: CopyOptions = {}): Promise<void> {
    if (this.#handoff === undefined) throw new Error("it was not prepared");
    await playArchiver(this.#handoff, async (archive) => {
      await options.interrupt?.then(() => Promise.reject(new Error("interrupted by signal")));
      await packTree("tar", tree, archive);
    });
  }

  async cleanup(vmid: number, type: GuestType | undefined, success: boolean, error?: string): Promise<void> {
    await this.#provider.backup.backupCleanup(vmid, type, success, error, never);
  }

  async logFile(vmid: number, file: string): Promise<void> {
    await this.#provider.backup.backupHandleLogFile(vmid, file);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#provider[Symbol.asyncDispose]();
  }
}

interface ShimOptions extends Omit<ScriptOptions, "root"> {
  readonly scfg?: Record<string, unknown>;
}

/** One perl -T with one provider object of the shim. */
export class ShimHooks implements Hooks {
  readonly child: ChildProcessWithoutNullStreams;
  readonly log: string[];
  readonly #dir: string;
  readonly #bridge: string;
  readonly #perl: PerlCalls;

  private constructor(perl: PerlCalls, node: TestNode, bridge: string) {
    this.#perl = perl;
    this.child = perl.child;
    this.log = perl.log;
    this.#bridge = bridge;
    this.#dir = node.dir;
  }

  static async start(node: TestNode, { scfg = {}, ...script }: ShimOptions): Promise<ShimHooks> {
    const { dir, log, root, storeid } = node;
    const section = { path: node.storePath, content: "backup", "vm-backup-mode": "incremental", ...scfg };
    const perl = await PerlCalls.start({ dir, log, root, storeid, scfg: section, ...script });
    return new ShimHooks(perl, node, script.bridge);
  }

  async jobInit(): Promise<void> {
    await this.#call("job_init", 1_700_000_000);
  }

  async jobCleanup(): Promise<void> {
    await this.#call("job_cleanup");
  }

  async backupInit(vmid: number, type: GuestType, epoch: number): Promise<string> {
    const result = (await this.#call("backup_init", vmid, type, epoch)) as Record<string, string>;
    return result["archive-name"] ?? "none";
  }

  async mechanism(vmid: number, type: GuestType): Promise<void> {
    await this.#call("backup_get_mechanism", vmid, type);
  }

  async query(vmid: number, devices: Sizes): Promise<Record<string, "new" | "use">> {
    const answer = await this.#call("backup_vm_query_incremental", vmid, Object.fromEntries(devices));
    return answer as Record<string, "new" | "use">;
  }

  async backupVm(vmid: number, config: string, volumes: Volumes, options: CopyOptions = {}): Promise<void> {
    void options.interrupt?.then(() => this.child.kill("SIGTERM"));
    const limit = options.bandwidthLimit === undefined ? {} : { "bandwidth-limit": options.bandwidthLimit };
    await this.#call("backup_vm", vmid, { file: await this.#file("guest.conf", config) }, volumes, limit);
  }

  async prepare(vmid: number, tree: string): Promise<void> {
    await this.#call("backup_container_prepare", vmid, infoOf(tree));
  }

  async backupContainer(vmid: number, tree: string, options: CopyOptions = {}): Promise<void> {
    void options.interrupt?.then(() => this.#untilSecondNode()).then(() => this.child.kill("SIGTERM"));
    const info = { ...infoOf(tree), "bandwidth-limit": options.bandwidthLimit ?? 0 };
    await this.#call("backup_container", vmid, { file: await this.#file("ct.conf", "hostname: ct\n") }, [], info);
  }

  async cleanup(vmid: number, type: GuestType | undefined, success: boolean, error?: string): Promise<void> {
    await this.#call("backup_cleanup", vmid, type ?? null, success ? 1 : 0, error === undefined ? {} : { error });
  }

  async logFile(vmid: number, file: string): Promise<void> {
    await this.#call("backup_handle_log_file", vmid, file);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#perl[Symbol.asyncDispose]();
  }

  async #call(hook: string, ...args: unknown[]): Promise<unknown> {
    return await this.#perl.hook(hook, ...args);
  }

  async #file(name: string, content: string): Promise<string> {
    const file = path.join(this.#dir, name);
    await writeFile(file, content);
    return file;
  }

  /** Waits until the Node that reads the container exists: before that, a signal would reach perl outside the hook. */
  async #untilSecondNode(): Promise<void> {
    await until("the second Node runs", async () => (await processesNaming(this.#bridge)).length >= 2);
  }
}

const infoOf = (tree: string) => ({ directory: tree, sources: ["./"], "backup-user-id": 0 });
