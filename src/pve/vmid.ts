// SPDX-License-Identifier: AGPL-3.0-or-later
import { quote, RequestError } from "../core/index.ts";

const VMID_PATTERN = /^[1-9][0-9]{2,8}$/;

export function isVmidName(name: string): boolean {
  return VMID_PATTERN.test(name);
}

/** @throws RequestError unless `vmid` is one PVE can give out: 100 to 999999999 */
export function checkVmid(vmid: number): number {
  if (!Number.isInteger(vmid) || !isVmidName(String(vmid))) {
    throw new RequestError(`Cannot use guest id ${quote(String(vmid))}: expected a number from 100 to 999999999`);
  }
  return vmid;
}
