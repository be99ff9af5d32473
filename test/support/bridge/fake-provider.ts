// SPDX-License-Identifier: AGPL-3.0-or-later
// A test double of the directory provider: keeps everything in memory, records each call, and does what a test needs
// on demand. Its settings are keys of the storage section that begin with "test-".
import { openSync, readdirSync, readFileSync, readlinkSync, renameSync, symlinkSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { RequestError, UnsupportedError } from "../../../src/core/index.ts";
import { HandoffChannel, HandoffListener } from "../../../src/directory/container/container-handoff.ts";
import { prune } from "../../../src/maintenance/index.ts";
import type { HandleToOpen, Provider, ProviderContext, VmVolume, VolumeEntry } from "../../../src/provider/index.ts";

const CONFIG = Buffer.from([0x6e, 0x61, 0x6d, 0x65, 0x3a, 0x20, 0xff, 0x00, 0x0a]); // "name: ", no UTF-8, NUL
const ENTRY: VolumeEntry = {
  volname: "backup/100/qemu-1700000000",
  vmid: 100,
  subtype: "qemu",
  ctime: 1_700_000_000,
  size: 4096,
  format: "directory",
  notes: "zwei\nZeilen ä €",
  protected: false,
};

/** Every member returns a fixed answer, except where `test-behaviour` of the storage section says otherwise. */
export async function createFakeProvider(context: ProviderContext): Promise<Provider> {
  const behaviour = String(context.scfg["test-behaviour"] ?? "");
  if (behaviour === "broken-config") throw new RequestError('Cannot use the storage "bk": it is broken on purpose');
  const entries = new Map([[ENTRY.volname, ENTRY]]);
  if (behaviour === "protected") entries.set(ENTRY.volname, { ...ENTRY, protected: true });
  for (let n = 1; n < Number(context.scfg["test-entries"] ?? 1); n++) {
    const ctime = ENTRY.ctime + n;
    const volname = `backup/100/qemu-${ctime}`;
    entries.set(volname, { ...ENTRY, volname, ctime });
  }
  const attributes = new Map<string, string | number | undefined>([
    ["notes", ENTRY.notes],
    ["protected", 0],
  ]);
  const { log } = context;
  const nothing = async () => {};

  return {
    backup: {
      jobInit: async (startTime) => log("info", `job_init ${startTime}`),
      jobCleanup: async () => log("info", "job_cleanup"),
      backupInit: async (vmid, vmtype, startTime) => ({ archiveName: `${vmid}/${vmtype}-${startTime}` }),
      backupCleanup: async (vmid, vmtype, success, error) => {
        log("info", `backup_cleanup ${vmid} ${vmtype} ${success} ${error}`);
        return { archiveSize: 12_345_678_901 };
      },
      backupGetMechanism: async (_vmid, vmtype) => (vmtype === "lxc" ? "directory" : "nbd"),
      backupHandleLogFile: async (_vmid, filename) => {
        if (behaviour === "log-file-fails") throw new Error("the log file fails on purpose");
        log("info", `log file ${filename}`);
      },
      backupVmQueryIncremental: async (_vmid, volumes) =>
        new Map([...volumes].map(([device, { size }]) => [device, size > 1_000_000 ? "use" : "new"])),
      backupVm: async (_vmid, guestConfig, volumes, info, signal) => {
        const sizes = [...volumes].map(
          ([device, v]) => `${device}:${v.size}:${v.bitmapMode}:${v.bitmapName}:${v.nbdPath}`,
        );
        log("info", `backup_vm ${guestConfig.toString("hex")} ${sizes.join(",")}`);
        log("info", `limit ${info.bandwidthLimit} firewall [${info.firewallConfig?.toString("hex")}]`);
        if (behaviour === "hang") await sleep(60_000, undefined, { signal });
        if (behaviour === "hang-deaf") await sleep(60_000);
        if (behaviour === "crash") process.exit(7);
        if (behaviour === "bug") throw new TypeError("a bug on purpose");
        if (behaviour === "refuse") {
          throw new UnsupportedError("Cannot do it: refused on purpose", { hint: "try something else" });
        }
        if (behaviour === "stderr") process.stderr.write("first line\nsecond line\n");
        if (behaviour === "file-handle") await readFileHandles(context, volumes, signal);
      },
      backupContainerPrepare: async (_vmid, info) => {
        if (behaviour === "refuse") throw new UnsupportedError("Cannot back up containers: refused on purpose");
        return await prepareContainer(info.directory, behaviour);
      },
      backupContainer: async (vmid, guestConfig, patterns, info, [archiveFd = -1, handoffFd = -1]) => {
        log("info", `backup_container ${vmid} ${guestConfig} ${patterns.join(" ")} ${JSON.stringify(info)}`);
        log("info", `handles ${(await inheritedHandles()).filter((fd) => fd !== archiveFd && fd !== handoffFd)}`);
        if (behaviour === "container-fails") throw new UnsupportedError("Cannot do it: refused on purpose");
        if (behaviour === "container-crashes") process.exit(7);
        using channel = HandoffChannel.inherit(handoffFd);
        writeSync(archiveFd, "archive");
        channel.send({ commit: process.pid });
        for (let answer = await channel.next(); answer !== undefined; answer = await channel.next()) {
          log("info", `answer ${JSON.stringify(answer)}`);
          if (answer.ok === true) return;
        }
      },
    },
    restore: {
      restoreGetMechanism: async (volname) =>
        volname.includes("/lxc-") ? { mechanism: "tar", vmtype: "lxc" } : { mechanism: "qemu-img", vmtype: "qemu" },
      archiveGetGuestConfig: async () => CONFIG,
      archiveGetFirewallConfig: async (volname) => (volname.endsWith("1700000000") ? undefined : CONFIG),
      restoreVmInit: async () => new Map([["drive-scsi0", { size: 2 ** 44 }]]),
      restoreVmCleanup: nothing,
      restoreVmVolumeInit: async (_volname, device) => ({ qemuImgPath: `/run/fake/${device}.raw` }),
      restoreVmVolumeCleanup: nothing,
      restoreContainerInit: async () =>
        behaviour === "squashfs" ? { archiveDirectory: "/run/fake/archive" } : { tarPath: "/run/fake/archive.tar" },
      restoreContainerCleanup: nothing,
    },
    storage: {
      listVolumes: async (vmid) => [...entries.values()].filter((entry) => vmid === undefined || entry.vmid === vmid),
      volumeInfo: async (volname) => ({
        size: 4096,
        used: 1024,
        format: "directory",
        ...(behaviour === "incremental" ? { parent: `${volname}0` } : {}),
      }),
      getVolumeAttribute: async (_volname, attribute) => attributes.get(attribute),
      updateVolumeAttribute: async (_volname, attribute, value) => {
        if (!attributes.has(attribute)) {
          throw new RequestError(`Cannot set the attribute "${attribute}": there is no such attribute`);
        }
        attributes.set(attribute, value);
      },
      freeVolume: async (volname) => {
        throw new UnsupportedError(`Cannot remove "${volname}": this version does not remove backups`);
      },
      pruneBackups: async ({ keep, vmid, type, dryrun }) => {
        log("info", `prune_backups ${JSON.stringify({ keep, vmid, type, dryrun })}`);
        const found = [...entries.values()].filter((entry) => type === undefined || entry.subtype === type);
        const marked = await prune(found, keep, undefined);
        if (!dryrun && marked.some(({ mark }) => mark === "remove"))
          throw new UnsupportedError("Cannot prune: refused on purpose");
        return marked;
      },
    },
    async [Symbol.asyncDispose]() {
      if (behaviour === "dispose-hangs") await sleep(60_000);
      if (behaviour === "dispose-says") process.stderr.write("provider disposed\n");
    },
  };
}

/** Plays the side that owns the store: an archive in the directory, and one connection that gets an answer. */
async function prepareContainer(directory: string, behaviour: string): Promise<readonly HandleToOpen[]> {
  const archivePath = `${directory}/archive.tar`;
  const archive = openSync(archivePath, "wx+", 0o600);
  const handlePath = behaviour === "container-no-handle" ? archivePath : `/proc/${process.pid}/fd/${archive}`;
  if (behaviour === "container-swapped") {
    renameSync(archivePath, `${archivePath}.moved`);
    symlinkSync("/etc/passwd", archivePath);
  }
  const listener = await HandoffListener.open(`${directory}/run`, () => undefined);
  void listener.accept(new AbortController().signal).then(async (channel) => {
    const message = await channel.next();
    if (message?.commit !== undefined) {
      channel.send({ log: ["info", `archive of ${readFileSync(archivePath).length} bytes`] });
      channel.send({ ok: true });
    }
    channel.end();
  });
  return [
    { kind: "file", path: handlePath },
    { kind: "socket", path: listener.path, firstLine: listener.firstLine },
  ];
}

/** Handles above stderr that this process inherited from its parent: sockets, pipes and files. */
async function inheritedHandles(): Promise<number[]> {
  const found: number[] = [];
  for (const fd of readdirSync("/proc/self/fd").map(Number)) {
    const target = fd > 2 ? tryReadLink(`/proc/self/fd/${fd}`) : "";
    // Node's own handles are anonymous, or pipes to itself: the tests look for files and sockets.
    if (/^(\/(?!proc\/|dev\/)|socket:)/.test(target)) found.push(fd);
  }
  return found.sort((a, b) => a - b);
}

function tryReadLink(file: string): string {
  try {
    return readlinkSync(file);
  } catch {
    return "";
  }
}

/** Requests all dirty regions in small batches and deallocates them. */
async function readFileHandles(
  context: ProviderContext,
  volumes: ReadonlyMap<string, VmVolume>,
  signal: AbortSignal,
): Promise<void> {
  const { fileHandles } = context;
  if (fileHandles === undefined) throw new Error("no Perl side");
  const timeoutMs = Number(context.scfg["test-timeout-ms"] ?? 300_000);
  for (const [device, { fileHandle }] of volumes) {
    if (fileHandle !== undefined) {
      context.log("info", `handle of ${device}: ${tryReadLink(`/proc/${fileHandle.pid}/fd/${fileHandle.fd}`)}`);
    }
    for (let done = false; !done; ) {
      const batch = await fileHandles.nextDirtyRegions(device, 2, timeoutMs, signal);
      done = batch.done;
      context.log(
        "info",
        `${device}: ${batch.regions.map((r) => `${r.offset}+${r.length}`).join(" ")}${done ? " done" : ""}`,
      );
      await fileHandles.deallocate(device, batch.regions, signal);
    }
  }
}
