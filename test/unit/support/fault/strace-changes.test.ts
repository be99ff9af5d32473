// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { readChanges } from "../../../support/fault/strace-changes.ts";

const ENTER = 'openat(AT_FDCWD</>, "/proc/self/fd/20/100", O_RDONLY|O_DIRECTORY';

describe("readChanges()", () => {
  it("follows descriptors through threads, reuse and renames", () => {
    const output = [
      "1 clone3({flags=CLONE_VM|CLONE_FILES|CLONE_THREAD, exit_signal=0}, 88) = 2",
      '1 openat(AT_FDCWD</>, "/store", O_RDONLY|O_DIRECTORY) = 20</store>',
      `2 ${ENTER} <unfinished ...>`,
      '1 mkdir("/proc/self/fd/20/101", 0700) = 0',
      "2 <... openat resumed>) = 21</store/100>",
      '2 openat(AT_FDCWD</>, "/proc/self/fd/21/a", O_RDWR|O_CREAT|O_EXCL, 0600) = 22</store/100/a>',
      '1 rename("/proc/self/fd/20/100", "/proc/self/fd/20/102") = 0',
      '2 unlink("/proc/self/fd/21/a") = 0',
      "2 fsync(22</store/102/a>(deleted)) = 0",
      '1 openat(AT_FDCWD</>, "/elsewhere", O_RDONLY|O_DIRECTORY) = 21</elsewhere>',
      '1 rmdir("/proc/self/fd/21/x") = 0',
      '1 unlink("/proc/self/fd/20/none") = -1 ENOENT (No such file or directory)',
    ];
    expect(readChanges(output.join("\n"), ["/store"])).toEqual([
      { kind: "mkdir", path: "/store/101" },
      { kind: "create", path: "/store/100/a" },
      { kind: "rename", path: "/store/102" },
      { kind: "unlink", path: "/store/102/a" },
      { kind: "sync", path: "/store/102/a" },
    ]);
  });

  it("does not take the descriptors of another process for ours", () => {
    const output = [
      "1 clone(child_stack=NULL, flags=CLONE_VM|CLONE_VFORK|SIGCHLD) = 3",
      '1 openat(AT_FDCWD</>, "/store", O_RDONLY) = 20</store>',
      '3 openat(AT_FDCWD</>, "/elsewhere", O_RDONLY) = 20</elsewhere>',
      '1 unlink("/proc/self/fd/20/a") = 0',
      '3 openat(AT_FDCWD</>, "/proc/self/fd/20", O_RDWR) = 21</store/b>',
    ];
    expect(readChanges(output.join("\n"), ["/store"])).toEqual([
      { kind: "unlink", path: "/store/a" },
      { kind: "open", path: "/store/b" },
    ]);
  });
});
