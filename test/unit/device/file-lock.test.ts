// SPDX-License-Identifier: AGPL-3.0-or-later
// Answers of flock(2) that no test can have from the kernel. Its locks against Perl's: test/interop/device.
import { mkdtemp, readdir, readlink, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { lockFile } from "../../../src/device/file-lock.ts";

/** What the calls end with, in turn; 0 is success. Numbers as on x86-64 and ARM: errno(3). */
const answers = vi.hoisted((): number[] => []);
const EINTR = 4;
const EAGAIN = 11;
const ENOLCK = 37;

vi.mock("../../../src/host/index.ts", () => {
  let errno = 0;
  const flock = (): number => {
    errno = answers.shift() ?? 0;
    return errno === 0 ? 0 : -1;
  };
  return { loadKoffi: () => ({ errno: () => errno }), loadNativeLibrary: () => ({ func: () => flock }) };
});

const never = new AbortController().signal;
let dir: string;
let file: string;

beforeEach(async () => {
  dir = await mkdtemp(path.join(os.tmpdir(), "file-lock-"));
  file = path.join(dir, "a/lock");
});

afterEach(async () => {
  expect(answers).toEqual([]);
  await rm(dir, { recursive: true });
});

/** Of this process, on the lock file. */
async function openHandles(): Promise<number> {
  const links = (await readdir("/proc/self/fd")).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => ""));
  return (await Promise.all(links)).filter((target) => target === file).length;
}

describe("lockFile()", () => {
  it("tries again while another has the lock, and after a signal", async () => {
    answers.push(EAGAIN, EINTR, EAGAIN, 0);
    await using _lock = await lockFile(file, 20_000, never);
    expect(await openHandles()).toBe(1);
  });

  it.each([
    ["ENOLCK", ENOLCK],
    ["errno 4095", 4095],
  ])("names what the system refuses with (%s), and closes the file", async (errno, number) => {
    answers.push(number);
    const locking = lockFile(file, 20_000, never);
    await expect(locking).rejects.toThrow(`Cannot lock "${file}": the system refuses (${errno})`);
    await expect(locking).rejects.toMatchObject({ code: "ENVIRONMENT", errno });
    expect(await openHandles()).toBe(0);
  });
});
