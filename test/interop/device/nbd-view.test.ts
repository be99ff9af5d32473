// SPDX-License-Identifier: AGPL-3.0-or-later
// Views by /dev/nbdX as far as a machine without the kernel module can show them: the choice, the refusals, and what
// a real qemu-nbd does with nodes that it cannot connect. Connected nodes: test/vm.
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, readdir, readFile, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it, type TestContext, vi } from "vitest";
import { until } from "../../../fixtures/lab/index.ts";
import { CancelledError } from "../../../src/core/index.ts";
import { type RawViewMechanism, sweepRawViews } from "../../../src/device/index.ts";
import { waitForRelease } from "../../../src/device/nbd-release.ts";
import { planConnect } from "../../../src/device/nbd-view.ts";
import { formatArchiveName } from "../../../src/pve/archive-name.ts";
import { MAX_CHAIN_LENGTH } from "../../../src/store/chain.ts";
import { backingFileName } from "../../../src/store/index.ts";
import { NbdTree } from "../../support/nbd/nbd-tree.ts";
import { processesNaming } from "../../support/programs/processes.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { openRawView } from "../../support/qcow2/open-images.ts";

const SIZE = 1024 * 1024;
const LOOP_MAJOR = 7;
const run = promisify(execFile);
const never = new AbortController().signal;

let tree: NbdTree;
let runDir: string;
let image: string;
const warnings: string[] = [];

beforeEach(async (context) => {
  requireTool(context, "qemu-img", "qemu-nbd", "qemu-storage-daemon", "setpriv", "fusermount3");
  await setUp(2);
});

afterEach(async () => {
  vi.useRealTimers();
  vi.unstubAllEnvs();
  expect(await processesNaming(tree.dir)).toEqual([]);
  await tree[Symbol.asyncDispose]();
});

async function setUp(nodes: number | undefined): Promise<void> {
  await tree?.[Symbol.asyncDispose]();
  tree = await NbdTree.create(nodes);
  warnings.length = 0;
  runDir = path.join(tree.host.run, "pve-backup-host");
  image = path.join(tree.dir, "a.qcow2");
  await run("qemu-img", ["create", "-q", "-f", "qcow2", image, `${SIZE}`]);
}

const openView = (mechanism: RawViewMechanism | undefined, signal = never) =>
  openRawView({
    ...{ chain: [image], sizeBytes: SIZE, runDir, name: "drive-scsi0", host: tree.host, signal },
    ...(mechanism === undefined ? {} : { mechanism }),
    warn: (message) => void warnings.push(message),
  });

/** No view, no reservation. The lock file stays: it is never removed. */
async function expectNothingLeft(): Promise<void> {
  expect(await readdir(runDir).catch(() => [])).toEqual([]);
  expect(await tree.reservations()).toBe("");
}

/** Puts a block device that is there, but is none of NBD's, in the place of the first node. */
async function makeLoopNode(context: TestContext): Promise<void> {
  const isThere = await readFile("/sys/block/loop0/size").catch(() => undefined);
  if (isThere === undefined) context.skip("needs /dev/loop0");
  const node = path.join(tree.host.dev, "nbd0");
  await run("rm", [node]);
  await run("mknod", [node, "b", `${LOOP_MAJOR}`, "0"]);
}

/** A program that says what qemu-nbd says, does to the tree what the kernel would, and is found before qemu-nbd. */
async function playServer(): Promise<void> {
  const bin = path.join(tree.dir, "bin");
  await mkdir(bin);
  const script = `#!/bin/sh
    [ "$1" != --disconnect ] || exit 0
    echo 'NBD device /dev/nbd0 is now connected to json:{"driver":"qcow2"}' >&2
    echo ${SIZE / 512} > "${tree.block(0)}/size"
    echo $$ > "${tree.block(0)}/pid"
    exec sleep 60`;
  await writeFile(path.join(bin, "qemu-nbd"), script, { mode: 0o755 });
  vi.stubEnv("PATH", `${bin}:${process.env.PATH}`);
}

async function expectFile(mechanism: RawViewMechanism | undefined): Promise<void> {
  await using view = await openView(mechanism);
  expect(view.path).toMatch(/\/restore-\d+-\d+\/drive-scsi0\.raw$/);
  expect((await stat(view.path)).size).toBe(SIZE);
}

describe("planConnect()", () => {
  it("names every image of the chain, and an end after the last", () => {
    const node =
      '{"driver":"qcow2","file":{"driver":"file","filename":"a,b.qcow2","read-only":true},"backing":' +
      '{"driver":"qcow2","file":{"driver":"file","filename":"../x/nbd:base","read-only":true},"backing":null,' +
      '"read-only":true},"read-only":true}';
    expect(planConnect("/dev/nbd7", ["a,b.qcow2", "../x/nbd:base"])).toEqual([
      ...["--verbose", "--read-only", "--connect=/dev/nbd7", "--"],
      `json:${node}`,
    ]);
  });

  it("takes the longest chain of the store, with the longest names", () => {
    const chain = Array.from({ length: MAX_CHAIN_LENGTH }, (_, index) => {
      const { folderName } = formatArchiveName(999_999_999, "qemu", 999_999_999_999 - index);
      return backingFileName(folderName, "d".repeat(64));
    });
    expect(planConnect("/dev/nbd0", chain).at(-1)?.length).toBeLessThan(50_000);
  });

  it("refuses a chain whose name is too long for one argument", () => {
    const chain = Array.from({ length: 1_000 }, (_, index) => `../qemu-${1_700_000_000 + index}/drive-scsi0.qcow2`);
    expect(() => planConnect("/dev/nbd0", chain)).toThrow(/its chain of 1000 images is too long for that$/);
    const longest = planConnect("/dev/nbd0", chain.slice(0, 500)).at(-1) ?? "";
    expect(longest.length).toBeLessThan(128 * 1024);
  });
});

describe("openRawView() by nbd", () => {
  it("says how to load the module where it is missing", async () => {
    await setUp(undefined);
    const attempt = openView("nbd");
    await expect(attempt).rejects.toThrow(/^Cannot use \/dev\/nbdX: the kernel module nbd is not loaded$/);
    await expect(attempt).rejects.toMatchObject({ hint: expect.stringContaining("modprobe nbd nbds_max=16") });
    await expectNothingLeft();
  });

  it("tells what qemu-nbd said of a node that has no driver, and leaves nothing behind", async () => {
    const message = /^Cannot offer "drive-scsi0" as ".*\/dev\/nbd0": qemu-nbd ended with status 1: .*No such device/;
    await expect(openView("nbd")).rejects.toThrow(message);
    await expectNothingLeft();
  });

  it("tries the next node when another program has taken the first", async (context) => {
    await makeLoopNode(context); // it refuses NBD's socket, as a taken node does
    await expect(openView("nbd")).rejects.toThrow(/dev\/nbd1": qemu-nbd ended .*No such device/);
    await expectNothingLeft();
  });

  it("tells how its qemu-nbd ended, and not what that had said when it connected", async (context) => {
    await makeLoopNode(context);
    await playServer();
    await using view = await openView("nbd");
    expect(await view.findTrouble()).toBeUndefined();
    process.kill(Number(await readFile(path.join(tree.block(0), "pid"), "utf8")), "SIGKILL");
    await until("the end is noticed", async () => /ended/.test((await view.findTrouble()) ?? ""));
    await tree.setPid(0, undefined);
    expect(await view.findTrouble()).toBe("qemu-nbd was ended by SIGKILL");
  });
});

describe("openRawView() by auto", () => {
  it.each(["auto", undefined] as const)(
    "takes a file where the module is missing, silently (%s)",
    async (mechanism) => {
      await setUp(undefined);
      await expectFile(mechanism);
      expect(warnings).toEqual([]);
    },
  );

  it("takes a file where no node is free, and says so once", async () => {
    for (const index of [0, 1]) await tree.setPid(index, 1);
    await expectFile("auto");
    expect(warnings).toEqual(["Cannot use /dev/nbdX: none of 2 nodes is free; a FUSE file is used instead"]);
  });

  it("takes a file where the node cannot be connected, and says why", async () => {
    await expectFile("auto");
    expect(warnings).toEqual([expect.stringMatching(/^Cannot offer .*No such device.*; a FUSE file is used instead$/)]);
    await expectNothingLeft();
  });

  it("fails with the file's reason where the image is to blame", async () => {
    await run("cp", ["/proc/self/status", image]);
    await expect(openView("auto")).rejects.toThrow(/as a raw file: .*not in qcow2 format/);
    await expectNothingLeft();
  });
});

describe.each(["nbd", "auto"] as const)("openRawView() by %s while qemu-nbd hangs", (mechanism) => {
  it("stops with the abort reason, tries no second way and leaves nothing behind", async () => {
    const bin = path.join(tree.dir, "bin");
    await mkdir(bin);
    // Not exec: what is looked for below is the command line.
    await writeFile(path.join(bin, "qemu-nbd"), "#!/bin/sh\nsleep 60 & wait", { mode: 0o755 });
    vi.stubEnv("PATH", `${bin}:${process.env.PATH}`);
    const aborter = new AbortController();
    const reason = new CancelledError("the job was cancelled");
    const stopped = expect(openView(mechanism, aborter.signal)).rejects.toBe(reason);
    await until("qemu-nbd runs", async () => (await processesNaming(`--connect=${tree.host.dev}`)).length > 0);
    aborter.abort(reason);
    await stopped;
    expect(warnings).toEqual([]);
    await expectNothingLeft();
  });
});

describe("openRawView() by fuse", () => {
  it("looks at no node", async () => {
    await expectFile("fuse");
    expect(warnings).toEqual([]);
    await expect(stat(tree.lockFile)).rejects.toThrow(/ENOENT/);
  });
});

describe("waitForRelease()", () => {
  it("waits while the process that served the node is still connected", async () => {
    await tree.setPid(0, process.pid);
    let isReleased = false;
    const waiting = waitForRelease(tree.host, 0, [process.pid]).then(() => {
      isReleased = true;
    });
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(isReleased).toBe(false);
    await tree.setPid(0, undefined);
    await waiting;
  });

  it("lets go of a node that another process has connected meanwhile", async () => {
    await tree.setPid(0, process.pid);
    await waitForRelease(tree.host, 0, [1]);
  });

  it("gives up when the kernel holds on to a node whose server is dead", async () => {
    const child = spawn("true");
    await once(child, "exit");
    await tree.setPid(0, child.pid);
    const message = /^Cannot release ".*\/dev\/nbd0": a program still has it open$/;
    vi.useFakeTimers({ toFake: ["performance"] });
    const waiting = expect(waitForRelease(tree.host, 0, [child.pid ?? 0])).rejects.toThrow(message);
    vi.advanceTimersByTime(10_001);
    await waiting;
  });
});

describe("sweepRawViews() with a node", () => {
  const deadOwner = { pid: 999_999_999, startTime: "1" };

  async function leaveBehind(nbdNode: unknown): Promise<void> {
    const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim();
    const folder = path.join(runDir, "restore-999999999-0");
    await mkdir(folder, { recursive: true });
    const record = { owner: { bootId, ...deadOwner }, children: [], nbdNode };
    await writeFile(path.join(folder, "owner.json"), JSON.stringify(record));
  }

  const sweep = () => sweepRawViews(runDir, (message) => void warnings.push(message), tree.host);

  it("removes the folder of a dead owner, and the socket that its qemu-nbd left", async () => {
    await leaveBehind(1);
    await tree.leaveSocket(0);
    await tree.leaveSocket(1);
    await sweep();
    expect(await readdir(runDir)).toEqual([]);
    expect(await readdir(tree.host.sockets)).toEqual(["qemu-nbd-nbd0"]);
    expect(warnings).toEqual([]);
  });

  it("leaves a node alone that another process has by now", async () => {
    await leaveBehind(1);
    await tree.leaveSocket(1);
    await tree.setPid(1, process.pid);
    await sweep();
    expect(await readdir(runDir)).toEqual([]);
    expect(await readdir(tree.host.sockets)).toEqual(["qemu-nbd-nbd1"]);
  });

  it("takes nothing but a number for a node", async () => {
    await leaveBehind("1");
    await tree.leaveSocket(1);
    await sweep();
    expect(await readdir(runDir)).toEqual([]);
    expect(await readdir(tree.host.sockets)).toEqual(["qemu-nbd-nbd1"]);
  });
});
