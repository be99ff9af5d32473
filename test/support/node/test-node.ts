// SPDX-License-Identifier: AGPL-3.0-or-later
// A node: a store, a directory that stands for the root with /etc/pve, /run and /var/lib, and providers on them.
import { mkdirSync } from "node:fs";
import { mkdtemp, rename, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import type { LogLevel } from "../../../src/core/index.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import type { DirectoryProviderOptions } from "../../../src/directory/storage-access.ts";
import type { HandedOver } from "../vm/file-handles.ts";

/** What every test of the provider needs of a node; a guest is added by the class that needs one. */
export class TestNode implements AsyncDisposable {
  readonly dir: string;
  /** Where the store is according to the storage's section; moveStore() changes it. */
  storePath: string;
  readonly root: string;
  readonly storeid: string = "bk";
  readonly log: string[] = [];
  /** What the Perl side would hold open. */
  handedOver: HandedOver | undefined;
  readonly #scfg: Record<string, unknown>;

  /** @param dir exists; everything of the node is below it */
  protected constructor(dir: string, scfg: Record<string, unknown> = {}) {
    this.dir = dir;
    this.root = path.join(dir, "root");
    this.storePath = path.join(dir, "store");
    this.#scfg = scfg;
    for (const folder of [this.storePath, path.join(this.root, "etc/pve/priv"), path.join(this.root, "run")]) {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
    }
  }

  static async create(scfg: Record<string, unknown> = {}): Promise<TestNode> {
    return new TestNode(await mkdtemp(path.join(tmpdir(), "pbh-node-")), scfg);
  }

  /** The storage's section in storage.cfg, as far as the test decides it. */
  get section(): Record<string, unknown> {
    return { path: this.storePath, ...this.#scfg };
  }

  provider(
    scfg: Record<string, unknown> = {},
    options: DirectoryProviderOptions = {},
    storeid = this.storeid,
  ): DirectoryProvider {
    const log = (level: LogLevel, message: string): void => void this.log.push(`${level}: ${message}`);
    const perlSide = (): HandedOver => {
      if (this.handedOver === undefined) throw new Error("no device is handed over as a file");
      return this.handedOver;
    };
    return new DirectoryProvider(
      {
        storeid,
        scfg: { "vm-backup-mode": "incremental", "dir-device-view": "fuse", ...this.section, ...scfg },
        nodename: "node1",
        log,
        fileHandles: {
          nextDirtyRegions: async (device, max, timeoutMs) => await perlSide().nextDirtyRegions(device, max, timeoutMs),
          deallocate: async (device, ranges) => await perlSide().deallocate(device, ranges),
        },
      },
      { root: this.root, timeouts: { connectTimeoutMs: 5_000, replyTimeoutMs: 5_000 }, ...options },
    );
  }

  /** The administrator moves the directory, and then changes the storage's section accordingly. */
  async moveStore(to: string): Promise<void> {
    await rename(this.storePath, to);
    this.storePath = to;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.dir, { recursive: true, force: true });
  }
}
