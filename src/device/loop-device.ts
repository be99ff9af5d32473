// SPDX-License-Identifier: AGPL-3.0-or-later
// Loop devices over files that are open already. mount(8) and losetup(8) take a name, which may lead to another file by
// then; the kernel takes a descriptor. Source: Linux include/uapi/linux/loop.h; LOOP_CONFIGURE is in Linux 5.8 and later.
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { constants as os } from "node:os";
import { EnvironmentError, environmentError } from "../core/index.ts";
import { loadKoffi, loadNativeLibrary, type RegularFile } from "../host/index.ts";

const CONTROL = "/dev/loop-control";
const LOOP_CTL_GET_FREE = 0x4c82;
const LOOP_CONFIGURE = 0x4c0a;
const LO_FLAGS_READ_ONLY = 1;
/** The device is free again when its last user has closed it: the mount, or this process. */
const LO_FLAGS_AUTOCLEAR = 4;

/** struct loop_config: fd u32 | block_size u32 | struct loop_info64, 232 bytes | reserved u64[8] */
const CONFIG_BYTES = 304;
/** lo_flags u32, at byte 52 of struct loop_info64. */
const FLAGS_AT = 8 + 52;
/** Other programs look for a free device, too, and may be quicker. */
const MAX_ATTEMPTS = 16;

interface LoopDevice extends AsyncDisposable {
  readonly path: string;
}

/**
 * Binds a free loop device, read-only, to a file. Disposing lets go of the device: without a mount on it, it is free.
 *
 * @param image borrowed until this settles
 * @throws EnvironmentError if there is no loop device to be had
 */
export async function openLoopDevice(image: RegularFile): Promise<LoopDevice> {
  const ioctl = loadIoctl();
  await using control = await openDevice(CONTROL);
  for (let attempt = 0; ; attempt++) {
    const number = ioctl(control, LOOP_CTL_GET_FREE, null);
    const path = `/dev/loop${number}`;
    const device = await openDevice(path);
    try {
      ioctl(device, LOOP_CONFIGURE, encodeLoopConfig(image.handle.fd));
      return { path, [Symbol.asyncDispose]: () => device.close() };
    } catch (error) {
      await device.close();
      const isTaken = error instanceof EnvironmentError && error.errno === "EBUSY";
      if (!isTaken || attempt === MAX_ATTEMPTS) throw error;
    }
  }
}

function encodeLoopConfig(fd: number): Buffer {
  const bytes = Buffer.alloc(CONFIG_BYTES);
  // A kernel interface: in the order of this machine's bytes, which is little-endian wherever Proxmox VE runs.
  bytes.writeUInt32LE(fd, 0);
  bytes.writeUInt32LE(LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR, FLAGS_AT);
  return bytes;
}

async function openDevice(path: string): Promise<FileHandle> {
  return await open(path, constants.O_RDONLY).catch((error: unknown) => {
    throw environmentError("open", path, error);
  });
}

/** @returns what the kernel answers, 0 or more. @throws EnvironmentError */
type Ioctl = (device: FileHandle, request: number, argument: Buffer | null) => number;

let loaded: Ioctl | undefined;

function loadIoctl(): Ioctl {
  if (loaded !== undefined) return loaded;
  const koffi = loadKoffi();
  const ioctl = loadNativeLibrary("libc.so.6")?.func("int ioctl(int fd, unsigned long request, void *argument)");
  if (koffi === undefined || ioctl === undefined) {
    throw new EnvironmentError("Cannot use a loop device: the addon koffi does not load");
  }
  loaded = (device, request, argument) => {
    const answer: number = ioctl(device.fd, request, argument);
    if (answer >= 0) return answer;
    const number = koffi.errno();
    const errno = Object.entries(os.errno).find(([, value]) => value === number)?.[0] ?? `errno ${number}`;
    throw new EnvironmentError(`Cannot use a loop device: the kernel refuses (${errno})`, { errno });
  };
  return loaded;
}
