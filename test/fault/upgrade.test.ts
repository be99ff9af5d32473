// SPDX-License-Identifier: AGPL-3.0-or-later
// The package is upgraded, or removed, while a job runs: what runs goes on with the code it has. Only a container's
// second Node starts late, from whatever is installed then: it works or says what is wrong.
import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type LabGuest, seededBytes } from "../../fixtures/lab/index.ts";
import { type BridgeBundle, buildBridge } from "../support/bridge/bridge-process.ts";
import { ShimHooks } from "../support/bridge/hooks.ts";
import { TestNode } from "../support/node/test-node.ts";
import { ModelContainer, playJob } from "../support/vm/pve-job.ts";
import { VmLedger } from "../support/vm/vm-ledger.ts";
import { DISK, MIB, startGuest, untilCopying, VMID } from "../support/vm/vm-rules.ts";

const project = path.resolve(import.meta.dirname, "../..");
const TIMEOUT = { timeout: 120_000 };
const CTID = 200;

let bundle: BridgeBundle;
beforeAll(async () => {
  bundle = await buildBridge();
});
afterAll(() => bundle[Symbol.asyncDispose]());

/** The installed files of one node. */
class Installation {
  readonly #dir: string;

  constructor(node: TestNode) {
    this.#dir = path.join(node.dir, "installed");
  }

  get bridge(): string {
    return path.join(this.#dir, "share/bridge.mjs");
  }

  get perlDir(): string {
    return path.join(this.#dir, "perl");
  }

  async install(): Promise<void> {
    await mkdir(path.dirname(this.bridge), { recursive: true });
    await cp(bundle.path, this.bridge);
    await cp(path.join(project, "dist/compress-worker.cjs"), path.join(this.#dir, "share/compress-worker.cjs"));
    await cp(path.join(project, "dist/node_modules"), path.join(this.#dir, "share/node_modules"), { recursive: true });
    await cp(path.join(project, "perl-shim/PVE"), path.join(this.perlDir, "PVE"), { recursive: true });
  }

  async remove(): Promise<void> {
    await rm(this.#dir, { recursive: true, force: true });
  }

  /** Another version that has nothing in common with this one. */
  async replaceAll(): Promise<void> {
    for (const entry of await readdir(this.#dir, { recursive: true, withFileTypes: true })) {
      if (!entry.isFile()) continue;
      const file = path.join(entry.parentPath, entry.name);
      await rm(file); // as dpkg does it: a new file under the old name
      await writeFile(file, entry.name.endsWith(".pm") ? "die 'new code';\n" : "throw new Error('new code');\n");
    }
  }

  /** The same bundle, but for the number of its protocol. */
  async replaceProtocol(): Promise<void> {
    const text = await readFile(this.bridge, "utf8");
    const changed = text.replace(/\bPROTOCOL_VERSION = 3\b/, "PROTOCOL_VERSION = 4");
    expect(changed).not.toBe(text);
    await rm(this.bridge);
    await writeFile(this.bridge, changed);
  }
}

interface Setting extends AsyncDisposable {
  readonly node: TestNode;
  readonly guest: LabGuest;
  readonly ledger: VmLedger;
  readonly installation: Installation;
  start(): Promise<ShimHooks>;
}

async function setUp(compression: string): Promise<Setting> {
  const scfg = { "dir-compression": compression };
  const node = await TestNode.create(scfg);
  const guest = await startGuest(node);
  const ledger = new VmLedger(node, guest);
  await ledger.backUp();
  await guest.write(DISK, 8 * MIB, Buffer.alloc(4 * MIB, "compressible "));
  await guest.write(DISK, 12 * MIB, seededBytes("second", 4 * MIB));
  const installation = new Installation(node);
  await installation.install();
  return {
    ...{ node, guest, ledger, installation },
    start: () => ShimHooks.start(node, { bridge: installation.bridge, perlDir: installation.perlDir, scfg }),
    async [Symbol.asyncDispose]() {
      await guest[Symbol.asyncDispose]();
      await node[Symbol.asyncDispose]();
    },
  };
}

/** By which algorithm the image of a point was digested. */
async function digestOf({ node }: Setting, volname: string): Promise<unknown> {
  const folder = path.join(node.storePath, volname.replace(/^backup\//, ""));
  const manifest = JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8")) as {
    files: Array<{ name: string; digest?: { algorithm: string } }>;
  };
  return manifest.files.find(({ name }) => name === `${DISK}.qcow2`)?.digest?.algorithm;
}

describe("a VM's backup during which the installed files", () => {
  const ways = [
    ["are removed after job_init", "zstd", "remove", "init"],
    ["are removed after job_init", "zlib", "remove", "init"],
    ["are removed in mid-copy", "zstd", "remove", "copy"],
    ["are replaced after job_init", "zstd", "replaceAll", "init"],
    ["are replaced in mid-copy", "zlib", "replaceAll", "copy"],
  ] as const;

  it.each(ways)("%s ends as if nothing had happened (%s)", TIMEOUT, async (_what, compression, way, when) => {
    await using setting = await setUp(compression);
    const { guest, installation, ledger, node } = setting;
    const volname = `backup/${VMID}/qemu-5000`;
    {
      await using hooks = await setting.start();
      await hooks.jobInit();
      if (when === "init") await installation[way]();
      await hooks.backupInit(VMID, "qemu", 5000);
      const modes = await hooks.query(VMID, guest.devices);
      expect(modes).toEqual({ [DISK]: "use" });
      const access = await guest.openBackup({ modes, oracleDir: `${node.dir}/o5000` });
      const options = when === "copy" ? { bandwidthLimit: 8 * MIB } : {};
      const copied = hooks.backupVm(VMID, guest.guestConfig, access.volumes, options);
      if (when === "copy") await untilCopying(node).then(() => installation[way]());
      await copied;
      await access.finish(true);
      await hooks.cleanup(VMID, "qemu", true);
      const log = path.join(node.dir, "task.log");
      await writeFile(log, "log\n");
      await hooks.logFile(VMID, log);
      await hooks.jobCleanup();
      ledger.add(volname, access.oracles);
      expect(node.log.filter((line) => /^(warn|err|perl):/.test(line))).toEqual([]);
    }
    expect(await digestOf(setting, volname)).toBe(await digestOf(setting, `backup/${VMID}/qemu-1000`));
    expect(await ledger.backUp()).toBe(`incremental since ${volname}`);
    await ledger.expectAllRight();
  });
});

describe("a container's backup during which the installed files", () => {
  const ways = [
    ["are replaced by the same version", "install", undefined],
    [
      "are removed",
      "remove",
      /^Cannot start the backup bridge: "\/.*\/bridge\.mjs" does not exist; install the package pve-backup-host again$/,
    ],
    [
      ...(["speak another protocol afterwards", "replaceProtocol"] as const),
      /^Cannot initialize the backup bridge: it speaks protocol version 4, the Perl side 3; the package was upgraded meanwhile: start the job again, and restart a daemon that says this$/,
    ],
    [
      "are replaced by something else",
      "replaceAll",
      /^Cannot finish "initialize": the backup bridge is gone, it exited with status 1 \(.*\)$/,
    ],
  ] as const;

  it.each(ways)(
    "%s works, or fails in one sentence; the other guests do not notice",
    TIMEOUT,
    async (_what, way, says) => {
      await using setting = await setUp("none");
      const { installation, node, guest, ledger } = setting;
      const container = await ModelContainer.create(node, CTID);
      {
        await using hooks = await setting.start();
        await hooks.jobInit();
        await hooks.backupInit(CTID, "lxc", 5000);
        const tree = path.join(node.dir, `tree-${CTID}`);
        await hooks.prepare(CTID, tree);
        await installation[way]();
        const failure = await hooks.backupContainer(CTID, tree).then(
          () => undefined,
          (error: Error) => error.message,
        );
        if (says === undefined) expect(failure).toBeUndefined();
        else expect(failure).toMatch(says);
        await hooks.cleanup(CTID, "lxc", failure === undefined, failure);
        await hooks.backupInit(VMID, "qemu", 5000); // the next guest of the job
        const modes = await hooks.query(VMID, guest.devices);
        const access = await guest.openBackup({ modes, oracleDir: `${node.dir}/o5000` });
        await hooks.backupVm(VMID, guest.guestConfig, access.volumes);
        await access.finish(true);
        await hooks.cleanup(VMID, "qemu", true);
        await hooks.jobCleanup();
        ledger.add(`backup/${VMID}/qemu-5000`, access.oracles);
      }
      await ledger.expectAllRight();
      const made = await readdir(path.join(node.storePath, String(CTID)));
      expect(made.filter((name) => name !== "state.json")).toEqual(says === undefined ? ["lxc-5000"] : []);
      await installation.remove();
      await rm(path.join(node.storePath, String(CTID)), { recursive: true, force: true });
      await installation.install();
      await using hooks = await setting.start();
      await playJob(hooks, { guests: [[container, "nowhere"]] }, node);
      await container.expectAllRight();
    },
  );
});
