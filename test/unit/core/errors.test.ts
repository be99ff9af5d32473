// SPDX-License-Identifier: AGPL-3.0-or-later
import { mkdirSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { environmentError, errnoOf, messageOf, RequestError } from "../../../src/core/index.ts";

describe("environmentError()", () => {
  it("names the act, the path, the state and the errno", () => {
    let thrown: unknown;
    try {
      mkdirSync("/proc/nowhere");
    } catch (error) {
      thrown = environmentError("create the folder", "/proc/nowhere", error);
    }
    expect(messageOf(thrown)).toBe('Cannot create the folder "/proc/nowhere": no such file or directory (ENOENT)');
    expect(errnoOf(thrown)).toBe("ENOENT");
  });

  it("tells the first failure where giving something back failed too", () => {
    const full = Object.assign(new Error("ENOSPC: write"), { code: "ENOSPC", syscall: "write" });
    const both = Object.assign(new Error(""), { name: "SuppressedError", suppressed: full, error: new Error("close") });
    expect(messageOf(environmentError("write", "/x", both))).toBe(
      'Cannot write "/x": no space left on the device (ENOSPC)',
    );
    expect(errnoOf(both)).toBe("ENOSPC");
    const refused = new RequestError("Cannot do it");
    expect(environmentError("write", "/x", Object.assign(new Error(""), { suppressed: refused }))).toBe(refused);
  });

  it("keeps the reason behind a path of any length", () => {
    const missing = Object.assign(new Error("EACCES: open"), { code: "EACCES", syscall: "open" });
    const { message } = environmentError("read", `/srv/${"folder/".repeat(560)}disk.qcow2`, missing);
    expect(message).toMatch(/^Cannot read "\/srv\/folder.*….*\/disk\.qcow2": permission denied \(EACCES\)$/);
    expect(message.length).toBeLessThan(250);
  });

  it("passes an error of our own unchanged", () => {
    const inner = new RequestError("Cannot do it");
    expect(environmentError("read", "x", inner)).toBe(inner);
  });
});

describe("HostError", () => {
  it("folds its message into one line: the task log is line based", () => {
    expect(new RequestError("Cannot use\nthis\u0000name").message).toBe("Cannot use this name");
  });
});
