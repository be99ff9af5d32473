// SPDX-License-Identifier: AGPL-3.0-or-later

export type { ProcessIdentity } from "../host/index.ts";
export type { Attributes, VerifyState } from "./attributes.ts";
export type { BaseDecision, BaseQuestion } from "./base.ts";
export { MAX_CHAIN_LENGTH, type OpenChain } from "./chain.ts";
export type { CommitParts, StagedDevice } from "./commit.ts";
export * from "./errors.ts";
export { type GuestIdentity, parseVmgenid, readGuestIdentity, readGuestProcess } from "./guest-identity.ts";
export type { GuestLock } from "./guest-lock.ts";
export {
  type ArchiveName,
  backingFileName,
  checkDeviceName,
  checkVmid,
  deviceFileName,
  FIREWALL_CONFIG_FILE,
  formatArchiveName,
  GUEST_CONFIG_FILE,
  isDeviceName,
  LOG_FILE,
  MANIFEST_FILE,
  type PointType,
  parseArchiveName,
  volnameOf,
} from "./layout.ts";
export { LOCK_TIMING, type LockTiming } from "./lock-record.ts";
export type { Manifest, ManifestContainer, ManifestDevice, ManifestFile } from "./manifest.ts";
export type { Point, PointDevice } from "./point.ts";
export type { ChainLock } from "./point-lock.ts";
export { assertSound } from "./sound-image.ts";
export type { StagedPoint } from "./staged-point.ts";
export { type PointEntry, Store, type StoreOptions } from "./store.ts";
