// SPDX-License-Identifier: AGPL-3.0-or-later
// A kernel pipe between two children, so that data flows without passing this process. Node's own
// "pipe" is a socket pair whose other end it reads itself.
import { closeSync } from "node:fs";
import { loadNativeLibrary } from "../host/index.ts";

const O_CLOEXEC = 0o2000000;
const F_SETPIPE_SZ = 1031;
const PIPE_BYTES = 1024 * 1024;

export interface KernelPipe extends Disposable {
  readonly readFd: number;
  readonly writeFd: number;
  /** To be called as soon as the writer has started: the end of the data is seen only then. */
  closeWriteEnd(): void;
}

type Pipe2 = (fds: Int32Array, flags: number) => number;
type Fcntl = (fd: number, command: number, type: string, value: number) => number;

/** @returns undefined where libc cannot be called (koffi does not load): the caller passes the data itself */
export function tryCreatePipe(): KernelPipe | undefined {
  const libc = loadNativeLibrary("libc.so.6");
  if (libc === undefined) return undefined;
  const pipe2: Pipe2 = libc.func("int pipe2(_Out_ int *fds, int flags)");
  const fcntl: Fcntl = libc.func("int fcntl(int fd, int command, ...)");
  const fds = new Int32Array(2);
  if (pipe2(fds, O_CLOEXEC) !== 0) return undefined;
  const [readFd, writeFd] = fds as unknown as [number, number];
  fcntl(writeFd, F_SETPIPE_SZ, "int", PIPE_BYTES); // a smaller pipe works too
  const open = new Set([readFd, writeFd]);
  const close = (fd: number): void => {
    if (open.delete(fd)) closeSync(fd);
  };
  return {
    readFd,
    writeFd,
    closeWriteEnd: () => close(writeFd),
    [Symbol.dispose]() {
      close(readFd);
      close(writeFd);
    },
  };
}
