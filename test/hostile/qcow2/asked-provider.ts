// SPDX-License-Identifier: AGPL-3.0-or-later
// A provider that is asked what the next backup of VM 100 may build on.
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { type Lab, NEVER, VMGENID } from "../../unit/store/lab.ts";

export const DEVICE = "drive-scsi0";
/** What the VM's backups say of it too. */
export const GUEST_CONFIG = `memory: 512\nvmgenid: ${VMGENID}\n`;

export class AskedProvider implements AsyncDisposable {
  readonly provider: DirectoryProvider;
  /** After every backup that a test makes. */
  #epoch = 1_800_000_000;

  private constructor(provider: DirectoryProvider) {
    this.provider = provider;
  }

  static async open({ path, root }: Lab): Promise<AskedProvider> {
    await mkdir(join(root, "etc/pve/qemu-server"), { recursive: true });
    await writeFile(join(root, "etc/pve/qemu-server/100.conf"), GUEST_CONFIG);
    const scfg = { path, "vm-backup-mode": "incremental", "dir-compression": "none" };
    const context = { storeid: "bk", scfg, nodename: "pve1", log: () => undefined };
    return new AskedProvider(new DirectoryProvider(context, { root }));
  }

  /** What the next backup is told to do with its bitmap. */
  async nextMode(sizeBytes: number): Promise<string | undefined> {
    const volumes = new Map([[DEVICE, { size: sizeBytes }]]);
    await this.provider.backup.backupInit(100, "qemu", this.#epoch++, NEVER);
    const modes = await this.provider.backup.backupVmQueryIncremental(100, volumes, NEVER);
    await this.provider.backup.backupCleanup(100, "qemu", false, "it was only a question", NEVER);
    return modes.get(DEVICE);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.provider[Symbol.asyncDispose]();
  }
}
