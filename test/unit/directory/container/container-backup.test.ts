// SPDX-License-Identifier: AGPL-3.0-or-later
// The side of a container's backup that owns the store, against an archiver that this test plays.
import { execFile } from "node:child_process";
import {
  link,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { HandoffChannel, HandoffMessage } from "../../../../src/directory/container/container-handoff.ts";
import { DirectoryProvider } from "../../../../src/directory/directory-provider.ts";
import type { ContainerOffer } from "../../../../src/provider/index.ts";
import { handoffOf } from "../../../support/container/archiver.ts";
import { takeHandoff } from "../../../support/container/take-handoff.ts";
import { requireTool } from "../../../support/programs/tools.ts";

const run = promisify(execFile);
const never = new AbortController().signal;
const CONFIG = Buffer.from("hostname: ct\n# \u00e4\n");
const GOOD_COMMIT = { commit: { files: 13, bytes: 100, warnings: 2, "guest-config": CONFIG.toString("base64") } };

let dir: string;
let log: string[];
let provider: DirectoryProvider;
let epoch = 1_700_000_000;

function makeProvider(scfg: Record<string, unknown> = {}): DirectoryProvider {
  const context = {
    storeid: "bk",
    scfg: { path: path.join(dir, "store"), "dir-compression": "none", ...scfg },
    nodename: "node1",

    log: (level: string, message: string): void => void log.push(`${level}: ${message}`),
  };
  return new DirectoryProvider(context, { root: path.join(dir, "root") });
}

beforeEach(async (context) => {
  requireTool(context, "tar", "mksquashfs");
  dir = await mkdtemp(path.join(os.tmpdir(), "container-backup-"));
  for (const name of ["store", "root/etc/pve/priv", "tree/sbin", "tree/etc"]) {
    await mkdir(path.join(dir, name), { recursive: true });
  }
  for (let n = 0; n < 10; n++) await writeFile(path.join(dir, `tree/etc/f${n}`), "x".repeat(n * 10));
  log = [];
  provider = makeProvider();
});

afterEach(async () => {
  await provider[Symbol.asyncDispose]();
  await rm(dir, { recursive: true, force: true });
});

interface Archiver {
  readonly channel: HandoffChannel;
  /** Its name in the store. */
  readonly archive: string;
  /** What the Perl side opens. */
  readonly archivePath: string;
  readonly archiveName: string;
  /** The next message that is no log line. */
  answer(): Promise<HandoffMessage | undefined>;
}

/** Begins a backup and takes the archive over, as the Perl side does. */
async function begin(info: { firewallConfig?: Buffer; backupUserId?: number } = {}): Promise<Archiver> {
  const { archiveName } = await provider.backup.backupInit(101, "lxc", ++epoch, never);
  const handles = await provider.backup.backupContainerPrepare(
    101,
    {
      directory: path.join(dir, "tree"),
      sources: ["./"],
      backupUserId: info.backupUserId ?? 100_000,
      bandwidthLimit: 0,
      firewallConfig: info.firewallConfig,
    },
    never,
  );
  const { archivePath, socketPath, token } = handoffOf(handles);
  const channel = await takeHandoff(socketPath, token);
  const answer = async (): Promise<HandoffMessage | undefined> => {
    for (;;) {
      const message = await channel.next();
      if (message === undefined || !("log" in message)) return message;
      log.push(`${(message.log as string[])[0]}: ${(message.log as string[])[1]}`);
    }
  };
  return { channel, archive: await readlink(archivePath), archivePath, archiveName, answer };
}

async function fill(archive: string): Promise<void> {
  await run("sh", ["-c", 'exec tar cf - -C "$1" . > "$2"', "-", path.join(dir, "tree"), archive]);
}

const cleanup = (success: boolean) =>
  provider.backup.backupCleanup(101, "lxc", success, success ? undefined : "x", never);
const points = async (): Promise<string[]> =>
  (await provider.storage.listVolumes(101, never)).map((entry) => entry.volname);

function errorOf(message: HandoffMessage | undefined): string {
  return String((message?.error as { message?: unknown } | undefined)?.message ?? JSON.stringify(message));
}

/** The guest's folder holds nothing but points and what belongs beside them. */
async function expectNoLeftovers(): Promise<void> {
  const names = await readdir(path.join(dir, "store/101")).catch(() => []);
  expect(names.filter((name) => !/^(lxc-[0-9]+|state\.json|failed|\.locks)$/.test(name))).toEqual([]);
  expect(await readdir(path.join(dir, "root/run/pve-backup-host")).catch(() => [])).toEqual([]);
}

describe("a container's backup", () => {
  it("is committed with its configs, its digest and what its archive holds", async () => {
    const { answer, archive, archiveName, channel } = await begin({ firewallConfig: Buffer.alloc(0) });
    await fill(archive);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
    const { archiveSize } = await cleanup(true);
    expect(archiveSize).toBeGreaterThan(10_000);
    expect(await points()).toEqual([`backup/${archiveName}`]);
    const folder = path.join(dir, "store", archiveName);
    const manifest = JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8"));
    // 1 folder ".", 2 in it, 10 files: 0 + 10 + ... + 90 bytes.
    expect(manifest.container).toEqual({
      archive: "archive.tar",
      members: 13,
      totalBytes: 450,
      hasSbin: true,
      warnings: 2,
    });
    const recorded = manifest.files.find((file: { name: string }) => file.name === "archive.tar");
    const tool = recorded.digest.algorithm === "sha256" ? ["sha256sum"] : ["xxhsum", "-H2"];
    const { stdout } = await run(tool[0] ?? "", [...tool.slice(1), path.join(folder, "archive.tar")]);
    expect(stdout).toContain(recorded.digest.value);
    expect(await readFile(path.join(folder, "guest.conf"))).toEqual(CONFIG);
    expect(await readFile(path.join(folder, "firewall.conf"))).toEqual(Buffer.alloc(0));
    await expectNoLeftovers();
  });

  it("gives the archive of squashfs to the container's root, and takes it back", async () => {
    provider = makeProvider({ "lxc-backup-mode": "squashfs" });
    const { answer, archive, archiveName, channel } = await begin();
    expect((await stat(archive)).uid).toBe(100_000);
    await run("mksquashfs", [path.join(dir, "tree"), archive, "-noappend", "-no-progress"]);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
    const found = await stat(path.join(dir, "store", archiveName, "archive.sqfs"));
    expect([found.uid, found.gid, found.mode & 0o777]).toEqual([0, 0, 0o600]);
  });

  it("hands over the file that it made, whatever the names on the way lead to by then", async () => {
    const { answer, archive, archivePath, channel } = await begin();
    expect(archivePath).toMatch(new RegExp(`^/proc/${process.pid}/fd/[0-9]+$`));
    const guest = path.join(dir, "store/101");
    await rename(guest, `${guest}.moved`);
    await mkdir(path.dirname(archive), { recursive: true });
    await writeFile(archive, "root's");
    await fill(archivePath);
    expect(await readFile(archive, "utf8")).toBe("root's");
    await rm(guest, { recursive: true });
    await rename(`${guest}.moved`, guest);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
  });

  it("keeps the archive of tar with root from the start", async () => {
    const { archive } = await begin();
    const found = await stat(archive);
    expect([found.uid, found.mode & 0o777]).toEqual([0, 0o600]);
  });

  it("warns of a container that Proxmox VE would refuse to restore", async () => {
    await rm(path.join(dir, "tree/sbin"), { recursive: true });
    for (let n = 0; n < 6; n++) await rm(path.join(dir, `tree/etc/f${n}`));
    const { answer, archive, channel } = await begin();
    await fill(archive);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
    expect(log.filter((line) => line.startsWith("warn"))).toEqual([
      'warn: Proxmox VE will refuse to restore archive.tar: it has no directory or link "sbin" at its top',
    ]);
  });

  it("stays when its archiver vanishes right after asking for the commit", async () => {
    const { archive, archiveName, channel } = await begin();
    await fill(archive);
    channel.send(GOOD_COMMIT);
    channel.end();
    await expect.poll(points).toEqual([`backup/${archiveName}`]);
    await cleanup(false);
    expect(await points()).toEqual([`backup/${archiveName}`]);
    expect(log.join("\n")).toMatch(/was complete before the job failed and is kept/);
  });

  it("stays when cleanups come in every order", async () => {
    const { answer, archive, archiveName, channel } = await begin();
    await fill(archive);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
    for (const success of [true, false, true, false]) expect((await cleanup(success)).archiveSize).toBeGreaterThan(0);
    await provider.backup.jobCleanup(never);
    expect(await points()).toEqual([`backup/${archiveName}`]);
  });
});

describe("a container's backup without a commit", () => {
  it("is none, whatever PVE believes", async () => {
    const { channel } = await begin();
    channel.end();
    await expect(cleanup(true)).rejects.toThrow("Cannot finish the backup of guest 101: nothing was committed");
    expect((await cleanup(false)).archiveSize).toBe(0);
    expect(await points()).toEqual([]);
    await expectNoLeftovers();
  });

  it("ends the archiver when the job ends", async () => {
    const { answer, channel } = await begin();
    await expect.poll(async () => await readdir(path.join(dir, "root/run/pve-backup-host"))).toEqual([]);
    await provider.backup.jobCleanup(never);
    expect(errorOf(await answer())).toBe("Cancelled: the backup of container 101 has ended");
    expect(await answer()).toBeUndefined();
    channel.send(GOOD_COMMIT); // too late
    await expectNoLeftovers();
  });

  it("leaves nothing where nobody took the archive over", async () => {
    await provider.backup.backupInit(101, "lxc", ++epoch, never);
    const info = { directory: dir, sources: ["./"], backupUserId: 1, bandwidthLimit: 0, firewallConfig: undefined };
    await provider.backup.backupContainerPrepare(101, info, never);
    await expect(provider.backup.backupContainerPrepare(101, info, never)).rejects.toThrow("it is already prepared");
    await cleanup(false);
    await expectNoLeftovers();
  });

  it("is refused without backup_init, and for the wrong type", async () => {
    const info = { directory: dir, sources: ["./"], backupUserId: 1, bandwidthLimit: 0, firewallConfig: undefined };
    await expect(provider.backup.backupContainerPrepare(101, info, never)).rejects.toThrow(
      "backup_init was not called for it",
    );
    await begin();
    await expect(provider.backup.backupVmQueryIncremental(101, new Map(), never)).rejects.toThrow(
      "backup_init was not called",
    );
  });
});

describe("the archive at the commit", () => {
  /** Sends the commit after `plant` and expects that there is no point. */
  async function expectRefused(plant: (archive: string) => Promise<void>, problem: RegExp): Promise<void> {
    const { answer, archive, channel } = await begin();
    await fill(archive);
    await plant(archive);
    channel.send(GOOD_COMMIT);
    expect(errorOf(await answer())).toMatch(problem);
    expect(await points()).toEqual([]);
    await cleanup(false);
    await expectNoLeftovers();
  }

  it("is refused when a symbolic link has its name, and the link is not followed", async () => {
    const victim = path.join(dir, "victim");
    await writeFile(victim, "secret", { mode: 0o640 });
    await expectRefused(async (archive) => {
      await rm(archive);
      await symlink(victim, archive);
    }, /it is not the file that was created/);
    expect([(await stat(victim)).mode & 0o777, await readFile(victim, "utf8")]).toEqual([0o640, "secret"]);
  });

  it("is refused when another file, or a device, has its name", async () => {
    await expectRefused(async (archive) => {
      await rename(archive, path.join(dir, "moved"));
      await writeFile(archive, "other");
    }, /it is not the file that was created/);
    await expectRefused(async (archive) => {
      await rm(archive);
      await run("mknod", [archive, "c", "1", "5"]);
    }, /it is not the file that was created/);
  });

  it("is refused when it has a second name", async () => {
    await expectRefused(
      (archive) => link(archive, path.join(dir, "second")),
      /it has 2 names \(hard links\), expected one/,
    );
  });

  it("is refused when it is a sparse file larger than anything here", async () => {
    await expectRefused(async (archive) => {
      await using handle = await open(archive, "r+");
      await handle.truncate(2 ** 43);
    }, /its size is .*, more than the file system holds/);
  });

  it("is refused when it is empty, cut off, or no archive", async () => {
    await expectRefused((archive) => writeFile(archive, Buffer.alloc(10_240)), /it is empty/); // a tar of nothing
    const problem = /^Cannot .*tar/;
    await expectRefused((archive) => writeFile(archive, ""), problem);
    await expectRefused((archive) => writeFile(archive, Buffer.alloc(50_000, "no archive ")), problem);
    await writeFile(path.join(dir, "tree/etc/large"), Buffer.alloc(100_000, "large"));
    await expectRefused(async (archive) => writeFile(archive, (await readFile(archive)).subarray(0, 50_000)), problem);
  });

  it.each([
    ["no commit", {}, /it has no "commit"/],
    ["a commit that is no object", { commit: 1 }, /it has no "commit"/],
    ["no guest config", { commit: { files: 1, bytes: 1, warnings: 0 } }, /it has no guest config/],
    ["a negative count", { commit: { ...GOOD_COMMIT.commit, warnings: -1 } }, /"warnings" is not a count/],
    [
      "a huge guest config",
      { commit: { ...GOOD_COMMIT.commit, "guest-config": Buffer.alloc(4 * 2 ** 20 + 1).toString("base64") } },
      /its guest config is too long/,
    ],
  ])("is refused with %s", async (_name, message, problem) => {
    const { answer, archive, channel } = await begin();
    await fill(archive);
    channel.send(message);
    expect(errorOf(await answer())).toMatch(problem);
    expect(await points()).toEqual([]);
  });
});

const tarPathOf = (offer: ContainerOffer): string => ("tarPath" in offer ? offer.tarPath : "");

describe("restoreGetMechanism()", () => {
  it("prefers tar where both archives are there, and answers alike in every process", async () => {
    const folder = path.join(dir, "store/102/lxc-1700000000");
    await mkdir(folder, { recursive: true });
    await writeFile(path.join(folder, "guest.conf"), CONFIG);
    await run("mksquashfs", [path.join(dir, "tree"), path.join(folder, "archive.sqfs"), "-no-progress"]);
    await run("tar", ["-C", path.join(dir, "tree"), "-cf", path.join(folder, "archive.tar"), "."]);
    const volname = "backup/102/lxc-1700000000";
    for (const mode of ["tar", "squashfs"]) {
      await using other = makeProvider({ "lxc-backup-mode": mode });
      expect(await other.restore.restoreGetMechanism(volname, never)).toEqual({ mechanism: "tar", vmtype: "lxc" });
      const tarPath = tarPathOf(await other.restore.restoreContainerInit(volname, never));
      expect(path.basename(tarPath)).toBe("archive.tar");
      expect(await readFile(tarPath)).toEqual(await readFile(path.join(folder, "archive.tar")));
    }
    await rm(path.join(folder, "archive.tar"));
    expect(await provider.restore.restoreGetMechanism(volname, never)).toEqual({
      mechanism: "directory",
      vmtype: "lxc",
    });
  });

  it("refuses an archive without a record that is cut off where a member ends, which tar would not notice", async () => {
    const folder = path.join(dir, "store/102/lxc-1700000000");
    const archive = path.join(folder, "archive.tar");
    await mkdir(folder, { recursive: true });
    await writeFile(path.join(folder, "guest.conf"), CONFIG);
    await run("tar", ["-C", path.join(dir, "tree"), "-cf", archive, "."]);
    const volname = "backup/102/lxc-1700000000";
    const tarPath = tarPathOf(await provider.restore.restoreContainerInit(volname, never));
    expect(await readFile(tarPath)).toEqual(await readFile(archive));
    await provider.restore.restoreContainerCleanup(volname);
    const { stdout } = await run("tar", ["--list", "--block-number", "--file", archive]);
    const last = /block (\d+): \S+\nblock \d+: \*\* Block of NULs/.exec(stdout)?.[1];
    await run("truncate", ["-s", `${Number(last) * 512}`, archive]);
    await run("tar", ["--list", "--file", archive]);
    await expect(provider.restore.restoreContainerInit(volname, never)).rejects.toThrow(
      /archive\.tar(?: is cut off|".*: it is cut off, its end mark is missing)$/,
    );
  });

  it("refuses a container's backup as a VM, and a name of another type", async () => {
    const { answer, archive, archiveName, channel } = await begin();
    await fill(archive);
    channel.send(GOOD_COMMIT);
    expect(await answer()).toEqual({ ok: true });
    await expect(provider.restore.restoreVmInit(`backup/${archiveName}`, never)).rejects.toThrow(
      "it is the backup of a container",
    );
    await expect(provider.restore.restoreGetMechanism("backup/101/openvz-1700000000", never)).rejects.toThrow(
      /<qemu\|lxc>/,
    );
  });
});
