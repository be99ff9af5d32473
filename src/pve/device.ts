// SPDX-License-Identifier: AGPL-3.0-or-later
import { quote, RequestError } from "../core/index.ts";

const DEVICE_PATTERN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** True for the name of a guest's device ("drive-scsi0") that may become part of a file name. */
export function isDeviceName(name: string): boolean {
  return DEVICE_PATTERN.test(name);
}

/** @throws RequestError for a name that must not become part of a file name */
export function checkDeviceName(name: string): string {
  if (!isDeviceName(name)) {
    throw new RequestError(`Cannot use device name ${quote(name)}: expected letters, digits, ".", "_" and "-"`);
  }
  return name;
}
