// SPDX-License-Identifier: AGPL-3.0-or-later
// A separate process that backs up one disk, begins its restore and offers a squashfs image as the restore of a
// container does, and prints what fault-fs.ts saw of all this. Arguments: the directory of the node, the socket and
// the size of the disk, the image.
// biome-ignore assist/source/organizeImports: it must come before the product
import { faultSwitch } from "./fault-fs.ts";
import { writeFile } from "node:fs/promises";
import path from "node:path";
import { mountSquashfs } from "../../../src/device/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";

const [dir = "", nbdPath = "", size = "0", image = ""] = process.argv.slice(2);
const never = new AbortController().signal;
const store = path.join(dir, "store");
const context = {
  storeid: "bk",
  scfg: { path: store, "dir-compression": "none" },
  nodename: "node1",

  log: () => undefined,
  fileHandles: { nextDirtyRegions: () => Promise.reject(), deallocate: () => Promise.reject() },
};
await writeFile(path.join(dir, "task.log"), "INFO: task log\n");
faultSwitch.arm([store, path.join(dir, "root")]);
await using provider = new DirectoryProvider(context, { root: path.join(dir, "root") });
await provider.backup.jobInit();
const { archiveName } = await provider.backup.backupInit(100, "qemu", 1000, never);
const volume = { size: Number(size), bitmapMode: "none", bitmapName: undefined, nbdPath } as const;
const info = { bandwidthLimit: 0, firewallConfig: Buffer.from("[OPTIONS]\n") };
await provider.backup.backupVm(100, Buffer.from("name: vm\n"), new Map([["drive-scsi0", volume]]), info, never);
await provider.storage.updateVolumeAttribute(`backup/${archiveName}`, "notes", "a note", never);
await provider.backup.backupCleanup(100, "qemu", true, undefined, never);
await provider.backup.backupHandleLogFile(100, path.join(dir, "task.log"));
await provider.backup.backupInit(100, "qemu", 2000, never);
await provider.backup.backupCleanup(100, "qemu", false, "failed", never);
await provider.backup.backupHandleLogFile(100, path.join(dir, "task.log"));
await provider.backup.jobCleanup(never);
await provider.restore.restoreVmInit(`backup/${archiveName}`, never);
await provider.restore.restoreVmCleanup(`backup/${archiveName}`);
const runDir = path.join(dir, "root/run/pve-backup-host");
await using file = await openRegularFile(image);
const view = await mountSquashfs({ image: file, runDir, mechanism: "squashfuse", signal: never });
await view[Symbol.asyncDispose]();
process.stdout.write(JSON.stringify(faultSwitch.operations));
faultSwitch.disarm();
