// SPDX-License-Identifier: AGPL-3.0-or-later
// Byte arithmetic that all formats share: alignment, u64 to number, human-readable sizes.

export const KIB = 1024;
export const MIB = 1024 * KIB;
export const GIB = 1024 * MIB;

/** Largest multiple of `alignment` that is not above `value`. Plain numbers, exact up to 2^53. */
export function alignDown(value: number, alignment: number): number {
  return value - (value % alignment);
}

/** Smallest multiple of `alignment` that is not below `value`. */
export function alignUp(value: number, alignment: number): number {
  return alignDown(value + alignment - 1, alignment);
}

/**
 * Turns a u64 into a plain number.
 *
 * @param what names the field in the message, e.g. "L1 offset"
 * @throws RangeError if the value is above 2^53 - 1
 */
export function toSafeNumber(value: bigint, what: string): number {
  if (value < 0n || value > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new RangeError(`Cannot use ${what} ${value}: it is not below 2^53`);
  }
  return Number(value);
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"] as const;

/** "1.5 GiB", as PVE prints it: binary units, one decimal where it is meaningful. */
export function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  const text = unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1);
  return `${text} ${UNITS[unit]}`;
}
