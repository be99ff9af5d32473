// SPDX-License-Identifier: AGPL-3.0-or-later
// Raw disks as oracles, seeded bytes, and QEMU's tools as judges of qcow2 images.
import { execFileSync, spawnSync } from "node:child_process";
import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export const KIB = 1024;
export const MIB = 1024 * KIB;

/** A directory that is removed by `using`. */
export function scratchDir(): Disposable & { readonly path: string; file(name: string): string } {
  const path = mkdtempSync(join(tmpdir(), "qcow2-test-"));
  return {
    path,
    file: (name) => join(path, name),
    [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }),
  };
}

/** Incompressible bytes; the same for the same seed. */
export function randomBytes(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(Math.ceil(length / 4) * 4);
  let state = (seed * 2654435761 + 1) >>> 0;
  for (let at = 0; at < bytes.length; at += 4) {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = state;
    mixed = Math.imul(mixed ^ (mixed >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    bytes.writeUInt32LE((mixed ^ (mixed >>> 15)) >>> 0, at);
  }
  return bytes.subarray(0, length);
}

/** Bytes that compress well, and differ everywhere. */
export function textBytes(length: number, seed: number): Buffer {
  const lines: string[] = [];
  for (let size = 0, line = 0; size < length; line++) {
    const text = `${seed} line ${line} of a file that compresses well enough\n`;
    lines.push(text);
    size += text.length;
  }
  return Buffer.from(lines.join("")).subarray(0, length);
}

export function qemuImg(...args: string[]): string {
  return execFileSync("qemu-img", args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

/** Exit code and texts of `qemu-img check`: 0 sound, 2 errors, 3 leaks. */
export function qemuCheck(path: string): { status: number | null; corruptions: number; leaks: number } {
  const { status, stdout } = spawnSync("qemu-img", ["check", "--output=json", "-f", "qcow2", path], {
    encoding: "utf8",
  });
  const report = stdout.startsWith("{") ? (JSON.parse(stdout) as { corruptions?: number; leaks?: number }) : {};
  return { status, corruptions: report.corruptions ?? 0, leaks: report.leaks ?? 0 };
}

/** Throws unless both read the same. */
export function qemuCompare(raw: string, qcow2: string): void {
  qemuImg("compare", "-f", "raw", "-F", "qcow2", raw, qcow2);
}

/** Writes `pieces` into a sparse file of `sizeBytes`. */
export function writeRaw(
  path: string,
  sizeBytes: number,
  pieces: ReadonlyArray<{ offset: number; bytes: Buffer }>,
): void {
  const fd = openSync(path, "w");
  try {
    ftruncateSync(fd, sizeBytes);
    for (const { offset, bytes } of pieces) writeSync(fd, bytes, 0, bytes.length, offset);
  } finally {
    closeSync(fd);
  }
}

/** Files below `folder` that this process has open. */
export function openFiles(folder: string): string[] {
  return readdirSync("/proc/self/fd").flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`);
      return target.startsWith(`${folder}/`) ? [target] : [];
    } catch {
      return []; // closed meanwhile
    }
  });
}

/** Overwrites bytes of a file in place. */
export function patchFile(path: string, offset: number, bytes: Buffer | string): void {
  const fd = openSync(path, "r+");
  try {
    const data = typeof bytes === "string" ? Buffer.from(bytes, "hex") : bytes;
    writeSync(fd, data, 0, data.length, offset);
  } finally {
    closeSync(fd);
  }
}

/** The command by which an administrator would check a digest. */
export function shellDigest(path: string): string {
  const bytes = readFileSync(path);
  const reordered = `${path}.reordered`;
  writeFileSync(reordered, Buffer.concat([bytes.subarray(65536), bytes.subarray(0, 65536)]));
  const line = execFileSync("xxhsum", ["-H2", reordered], { encoding: "utf8" });
  rmSync(reordered);
  return line.split(" ")[0] ?? "";
}
