// SPDX-License-Identifier: AGPL-3.0-or-later
// The store: points and their life, from the staging directory to the commit; catalog, chains, bases, witnesses. The
// files of the layout are in format/, locks in lock/. It reaches the disk only through host. Only `directory` knows
// what Proxmox VE asks of it, and in which order.
export type { Base } from "./base.ts";
export type { OpenChain } from "./chain.ts";
export { type ChainContent, openChainContent } from "./chain-content.ts";
export type { StagedDevice } from "./commit.ts";
export { PointDamagedError } from "./errors.ts";
export {
  backingFileName,
  deviceFileName,
  digestsFileName,
  FIREWALL_CONFIG_FILE,
  GUEST_CONFIG_FILE,
} from "./format/layout.ts";
export type { ManifestContainer, ManifestFile } from "./format/manifest.ts";
export type { GuestPoints } from "./guest-points.ts";
export type { HeldChains } from "./held-chains.ts";
export { assertUnchanged } from "./image-file.ts";
export type { GuestLock } from "./lock/guest-lock.ts";
export type { LockTiming } from "./lock/lock-record.ts";
export type { Point } from "./point.ts";
export { assertSound } from "./sound-image.ts";
export type { StagedPoint } from "./staged-point.ts";
export { type PointEntry, Store } from "./store.ts";
