// SPDX-License-Identifier: AGPL-3.0-or-later
// One line per hook: protocol params in, provider call, protocol result out.
import { UnsupportedError } from "../src/core/index.ts";
import type { Provider, PruneEntry } from "../src/provider/index.ts";
import {
  decodeAttributeValue,
  decodeBytes,
  decodeContainerInfo,
  decodeKeep,
  decodeSizes,
  decodeVmInfo,
  decodeVmVolumes,
  encodeAttributeValue,
  encodeBytes,
  encodeHandle,
  encodeSizes,
  encodeVolumeEntry,
  encodeVolumeInfo,
  type WireParams,
} from "./params.ts";

/** What a handler may use besides the provider. */
interface MethodContext {
  readonly storeid: string;
  readonly signal: AbortSignal;
}

type Method = (provider: Provider, params: WireParams, context: MethodContext) => Promise<unknown>;

/** The methods of the provider by RPC name, in the order of PVE's Base.pm; undefined results travel as null. */
export const PROVIDER_METHODS: Readonly<Record<string, Method>> = {
  job_init: async ({ backup }, p, { signal }) => await backup.jobInit?.(p["start-time"], signal),
  job_cleanup: async ({ backup }, _p, { signal }) => await backup.jobCleanup?.(signal),
  backup_init: async ({ backup }, p, { signal }) => {
    if (p.vmtype === "lxc" && backup.backupContainer === undefined) throw noContainers("back up");
    const { archiveName } = await backup.backupInit(p.vmid, p.vmtype, p["start-time"], signal);
    return { "archive-name": archiveName };
  },
  backup_cleanup: async ({ backup }, p, { signal }) => {
    const { archiveSize } = await backup.backupCleanup(p.vmid, p.vmtype, p.success, p.error, signal);
    return { stats: { "archive-size": archiveSize } };
  },
  backup_get_mechanism: async ({ backup }, p) => ({ mechanism: await backup.backupGetMechanism(p.vmid, p.vmtype) }),
  backup_handle_log_file: async ({ backup }, p) => await backup.backupHandleLogFile?.(p.vmid, p.filename),
  backup_vm_query_incremental: async ({ backup }, p, { signal }) => {
    const modes = await backup.backupVmQueryIncremental(p.vmid, decodeSizes(p.volumes), signal);
    return { devices: Object.fromEntries(modes) };
  },
  backup_vm_available_bitmaps: async ({ backup }, p, { storeid, signal }) => {
    const modes = await backup.backupVmQueryIncremental(p.vmid, decodeSizes(p.volumes), signal);
    return { devices: bitmapNames(modes, storeid) };
  },
  backup_vm: ({ backup }, p, { signal }) =>
    backup.backupVm(p.vmid, decodeBytes(p["guest-config"]), decodeVmVolumes(p.volumes), decodeVmInfo(p.info), signal),
  backup_container_prepare: async ({ backup }, p, { signal }) => {
    if (backup.backupContainerPrepare === undefined) throw noContainers("back up");
    const info = decodeContainerInfo(p.info);
    return { handles: (await backup.backupContainerPrepare(p.vmid, info, signal)).map(encodeHandle) };
  },
  backup_container: async ({ backup }, p, { signal }) => {
    if (backup.backupContainer === undefined) throw noContainers("back up");
    const info = decodeContainerInfo(p.info);
    const guestConfig = decodeBytes(p["guest-config"]);
    await backup.backupContainer(p.vmid, guestConfig, p["exclude-patterns"], info, p.handles, signal);
  },
  restore_get_mechanism: ({ restore }, p, { signal }) => restore.restoreGetMechanism(p.volname, signal),
  archive_get_guest_config: async ({ restore }, p, { signal }) => ({
    data: encodeBytes(await restore.archiveGetGuestConfig(p.volname, signal)),
  }),
  archive_get_firewall_config: async ({ restore }, p, { signal }) => {
    const data = await restore.archiveGetFirewallConfig(p.volname, signal);
    return { data: data === undefined ? null : encodeBytes(data) };
  },
  restore_vm_init: async ({ restore }, p, { signal }) => ({
    devices: encodeSizes(await restore.restoreVmInit(p.volname, signal)),
  }),
  restore_vm_cleanup: async ({ restore }, p, { signal }) => await restore.restoreVmCleanup?.(p.volname, signal),
  restore_vm_volume_init: async ({ restore }, p, { signal }) => {
    const { qemuImgPath } = await restore.restoreVmVolumeInit(p.volname, p["device-name"], signal);
    return { "qemu-img-path": qemuImgPath };
  },
  restore_vm_volume_cleanup: async ({ restore }, p, { signal }) =>
    await restore.restoreVmVolumeCleanup?.(p.volname, p["device-name"], signal),
  restore_container_init: async ({ restore }, p, { signal }) => {
    if (restore.restoreContainerInit === undefined) throw noContainers("restore");
    const offer = await restore.restoreContainerInit(p.volname, signal);
    return "tarPath" in offer ? { "tar-path": offer.tarPath } : { "archive-directory": offer.archiveDirectory };
  },
  restore_container_cleanup: async ({ restore }, p, { signal }) =>
    await restore.restoreContainerCleanup?.(p.volname, signal),

  list_volumes: async ({ storage }, p: Partial<WireParams>, { signal }) => ({
    volumes: (await storage.listVolumes(p.vmid, signal)).map(encodeVolumeEntry),
  }),
  volume_size_info: async ({ storage }, p, { signal }) => encodeVolumeInfo(await storage.volumeInfo(p.volname, signal)),
  get_volume_attribute: async ({ storage }, p, { signal }) => ({
    value: encodeAttributeValue(await storage.getVolumeAttribute(p.volname, p.attribute, signal)),
  }),
  update_volume_attribute: ({ storage }, p, { signal }) =>
    storage.updateVolumeAttribute(p.volname, p.attribute, decodeAttributeValue(p.value), signal),
  free_volume: ({ storage }, p, { signal }) => storage.freeVolume(p.volname, signal),
  prune_backups: async ({ storage }, p, { signal }) => {
    const request = { keep: decodeKeep(p.keep), vmid: p.vmid, type: p.type, dryrun: p.dryrun };
    const entries = await storage.pruneBackups(request, signal);
    const encode = ({ volname, vmid, subtype: type, ctime, mark }: PruneEntry) => ({
      volname,
      vmid,
      type,
      ctime,
      mark,
    });
    return { backups: entries.map(encode) };
  },
};

function noContainers(act: "back up" | "restore"): UnsupportedError {
  return new UnsupportedError(`Cannot ${act} containers: this type of storage does not support them`);
}

/**
 * "use" and "new" as bitmap names, for hosts that know only names. If the bitmap with the fixed name does not exist
 * yet, it is created, which makes that backup a full one. This is safe without remembering any name.
 */
function bitmapNames(modes: ReadonlyMap<string, "new" | "use">, storeid: string): Record<string, string> {
  const fresh = `${storeid}-${Date.now()}`;
  return Object.fromEntries([...modes].map(([device, mode]) => [device, mode === "use" ? storeid : fresh]));
}
