// SPDX-License-Identifier: AGPL-3.0-or-later
// One line per hook: protocol params in, provider call, protocol result out.
import type { BackupProvider } from "../src/provider/index.ts";
import {
  decodeAttributeValue,
  decodeBytes,
  decodeContainerInfo,
  decodeDescriptors,
  decodeSizes,
  decodeVmInfo,
  decodeVmVolumes,
  encodeAttributeValue,
  encodeBytes,
  encodeSizes,
  encodeVolumeEntry,
  type WireParams,
} from "./params.ts";

/** What a handler may use besides the provider. */
interface MethodContext {
  readonly storeid: string;
  readonly signal: AbortSignal;
}

type Method = (provider: BackupProvider, params: WireParams, context: MethodContext) => Promise<unknown>;

/** The methods of the provider by RPC name, in the order of PVE's Base.pm; undefined results travel as null. */
export const PROVIDER_METHODS: Readonly<Record<string, Method>> = {
  job_init: (provider, p, { signal }) => provider.jobInit(p["start-time"], signal),
  job_cleanup: (provider, _p, { signal }) => provider.jobCleanup(signal),
  backup_init: async (provider, p, { signal }) => {
    const { archiveName } = await provider.backupInit(p.vmid, p.vmtype, p["start-time"], signal);
    return { "archive-name": archiveName };
  },
  backup_cleanup: async (provider, p, { signal }) => {
    const { archiveSize } = await provider.backupCleanup(p.vmid, p.vmtype, p.success, p.error, signal);
    return { stats: { "archive-size": archiveSize } };
  },
  backup_get_mechanism: async (provider, p) => ({ mechanism: await provider.backupGetMechanism(p.vmid, p.vmtype) }),
  backup_handle_log_file: (provider, p) => provider.backupHandleLogFile(p.vmid, p.filename),
  backup_vm_query_incremental: async (provider, p, { signal }) => {
    const modes = await provider.backupVmQueryIncremental(p.vmid, decodeSizes(p.volumes), signal);
    return { devices: Object.fromEntries(modes) };
  },
  backup_vm_available_bitmaps: async (provider, p, { storeid, signal }) => {
    const modes = await provider.backupVmQueryIncremental(p.vmid, decodeSizes(p.volumes), signal);
    return { devices: bitmapNames(modes, storeid) };
  },
  backup_vm: (provider, p, { signal }) =>
    provider.backupVm(p.vmid, decodeBytes(p["guest-config"]), decodeVmVolumes(p.volumes), decodeVmInfo(p.info), signal),
  backup_container_prepare: async (provider, p, { signal }) => {
    const info = decodeContainerInfo(p.info);
    const { archivePath, socketPath, token } = await provider.backupContainerPrepare(p.vmid, info, signal);
    return { "archive-path": archivePath, "socket-path": socketPath, token };
  },
  backup_container: (provider, p, { signal }) =>
    provider.backupContainer(
      p.vmid,
      decodeBytes(p["guest-config"]),
      p["exclude-patterns"],
      decodeContainerInfo(p.info),
      decodeDescriptors(p),
      signal,
    ),
  restore_get_mechanism: (provider, p, { signal }) => provider.restoreGetMechanism(p.volname, signal),
  archive_get_guest_config: async (provider, p, { signal }) => ({
    data: encodeBytes(await provider.archiveGetGuestConfig(p.volname, signal)),
  }),
  archive_get_firewall_config: async (provider, p, { signal }) => {
    const data = await provider.archiveGetFirewallConfig(p.volname, signal);
    return { data: data === undefined ? null : encodeBytes(data) };
  },
  restore_vm_init: async (provider, p, { signal }) => ({
    devices: encodeSizes(await provider.restoreVmInit(p.volname, signal)),
  }),
  restore_vm_cleanup: (provider, p, { signal }) => provider.restoreVmCleanup(p.volname, signal),
  restore_vm_volume_init: async (provider, p, { signal }) => {
    const { qemuImgPath } = await provider.restoreVmVolumeInit(p.volname, p["device-name"], signal);
    return { "qemu-img-path": qemuImgPath };
  },
  restore_vm_volume_cleanup: (provider, p, { signal }) =>
    provider.restoreVmVolumeCleanup(p.volname, p["device-name"], signal),
  restore_container_init: async (provider, p, { signal }) => {
    const offer = await provider.restoreContainerInit(p.volname, signal);
    return "tarPath" in offer ? { "tar-path": offer.tarPath } : { "archive-directory": offer.archiveDirectory };
  },
  restore_container_cleanup: (provider, p, { signal }) => provider.restoreContainerCleanup(p.volname, signal),

  list_volumes: async (provider, p: Partial<WireParams>, { signal }) => ({
    volumes: (await provider.listVolumes(p.vmid, signal)).map(encodeVolumeEntry),
  }),
  volume_size_info: async (provider, p, { signal }) => {
    const { size, used, format, path, parent } = await provider.volumeInfo(p.volname, signal);
    return { size, used, format, path, ...(parent === undefined ? {} : { parent }) };
  },
  get_volume_attribute: async (provider, p, { signal }) => ({
    value: encodeAttributeValue(await provider.getVolumeAttribute(p.volname, p.attribute, signal)),
  }),
  update_volume_attribute: (provider, p, { signal }) =>
    provider.updateVolumeAttribute(p.volname, p.attribute, decodeAttributeValue(p.value), signal),
  free_volume: (provider, p, { signal }) => provider.freeVolume(p.volname, signal),
};

/**
 * "use" and "new" as bitmap names, for hosts that know only names. A bitmap of the steady name that is
 * not there yet is created, which makes that backup a full one: safe without remembering any name.
 */
function bitmapNames(modes: ReadonlyMap<string, "new" | "use">, storeid: string): Record<string, string> {
  const fresh = `${storeid}-${Date.now()}`;
  return Object.fromEntries([...modes].map(([device, mode]) => [device, mode === "use" ? storeid : fresh]));
}
