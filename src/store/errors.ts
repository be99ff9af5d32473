// SPDX-License-Identifier: AGPL-3.0-or-later
// What a caller of the store acts on. Everything else is an EnvironmentError of core.
import { HostError } from "../core/index.ts";

/** The path is missing, is not a directory, or does not answer. */
export class StoreUnavailableError extends HostError {
  override readonly code = "UNAVAILABLE";
}

/** The name of the new point is taken: two backups of one guest in the same second. */
export class PointExistsError extends HostError {
  override readonly code = "EXISTS";
}

/** A point or a file of its chain is not what its manifest says. */
export class PointDamagedError extends HostError {
  override readonly code = "DAMAGED";
}

/** The base that was promised to a job may no longer be built on. */
export class BaseUnusableError extends HostError {
  override readonly code = "BASE_UNUSABLE";
}

/** Another process holds the lock, or took over ours. */
export class LockedError extends HostError {
  override readonly code = "LOCKED";
}
