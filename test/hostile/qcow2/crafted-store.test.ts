// SPDX-License-Identifier: AGPL-3.0-or-later
// Every crafted image in a store: in place of a committed image, with a manifest that was forged to fit it, and
// in a folder as the upstream example leaves it. No restore begins with it, and no backup builds on it.
import { createHash } from "node:crypto";
import { open, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import type { Store } from "../../../src/store/index.ts";
import { requireTool } from "../../support/programs/tools.ts";
import { createLab, decide, editJson, type Lab, makeLegacy, NEVER, VMGENID } from "../../unit/store/lab.ts";
import { expectHostError } from "../cases.ts";
import { AskedProvider, DEVICE, GUEST_CONFIG } from "./asked-provider.ts";
import { CRAFTED } from "./crafted.ts";
import { Handmade, MIB } from "./handmade.ts";

const VOLNAME = "backup/100/qemu-1700000000";

let lab: Lab;
let store: Store;
let image: string;
let manifest: string;
let asked: AskedProvider;
let provider: DirectoryProvider;

/** One committed backup of guest 100, with a sound image, and a node on which its guest runs. */
beforeAll(async () => {
  lab = await createLab();
  store = await lab.open();
  {
    await using lock = await store.lockGuest(100, NEVER);
    await using staged = await store.beginPoint({ lock, type: "qemu", epoch: 1_700_000_000, signal: NEVER });
    await staged.writeFile("guest.conf", Buffer.from(GUEST_CONFIG));
    const { bytes } = new Handmade();
    await staged.writeFile(`${DEVICE}.qcow2`, bytes);
    const digest = { algorithm: "sha256", value: createHash("sha256").update(bytes).digest("hex") } as const;
    const counts = { readBytes: 65536, writtenBytes: bytes.length, zeroBytes: 0, fileBytes: bytes.length };
    const device = {
      name: DEVICE,
      virtualBytes: MIB,
      isIncremental: false,
      reason: "first backup",
      compression: "none",
      digest,
      ...counts,
    };
    await staged.commit({ devices: [device], process: undefined }, NEVER);
  }
  image = join(lab.path, "100/qemu-1700000000", `${DEVICE}.qcow2`);
  manifest = join(lab.path, "100/qemu-1700000000/manifest.json");
  asked = await AskedProvider.open(lab);
  provider = asked.provider;
});

afterAll(async () => {
  await asked[Symbol.asyncDispose]();
  await lab[Symbol.asyncDispose]();
});

/** What the manifest must say for these bytes to pass for what was committed. */
async function forge(bytes: Buffer): Promise<void> {
  await editJson(manifest, (value) => {
    const [device] = value.devices as Array<Record<string, unknown>>;
    const file = (value.files as Array<Record<string, unknown>>).find(({ name }) => name === `${DEVICE}.qcow2`);
    if (device === undefined || file === undefined) throw new Error("the manifest has no such device");
    device.headerSha256 = createHash("sha256").update(bytes.subarray(0, 65536)).digest("hex");
    device.virtualBytes = Math.min(Number.MAX_SAFE_INTEGER, Number(bytes.readBigUInt64BE(24)));
    file.sizeBytes = bytes.length;
    delete file.digest;
  });
}

/** What restore_vm_init says; undefined if it lets the image pass. */
async function restoreRefusal(volname: string): Promise<string | undefined> {
  try {
    await provider.restore.restoreVmInit(volname, NEVER);
    return undefined;
  } catch (error) {
    return expectHostError(error).message;
  } finally {
    await provider.restore.restoreVmCleanup(volname);
  }
}

/** Bytes from the raw file that a restore would read. */
async function readOffered(volname: string): Promise<Buffer> {
  await provider.restore.restoreVmInit(volname, NEVER);
  try {
    const { qemuImgPath } = await provider.restore.restoreVmVolumeInit(volname, DEVICE, NEVER);
    await using handle = await open(qemuImgPath);
    const { buffer } = await handle.read(Buffer.alloc(65536), 0, 65536, 0);
    return buffer;
  } finally {
    await provider.restore.restoreVmCleanup(volname);
  }
}

const REFUSED_BEFORE = CRAFTED.filter(({ stage }) => stage !== "read");
const REFUSED_AT_READ = CRAFTED.filter(({ stage }) => stage === "read");

describe("a store", () => {
  it("is sound before anything is swapped", async () => {
    expect(await restoreRefusal(VOLNAME)).toBeUndefined();
    expect(await asked.nextMode(MIB)).toBe("use");
  });

  it("does not take another sound image of the same size for the committed one", async () => {
    await writeFile(image, new Handmade({ compressionType: 1 }).bytes);
    expect(await restoreRefusal(VOLNAME)).toBe(`Cannot use "${image}": header checksum mismatch (sha256)`);
    expect(await asked.nextMode(MIB)).toBe("new");
    await writeFile(image, new Handmade().bytes);
  });

  it.for(CRAFTED)("does not take $name for the committed image", async ({ stage, make }, context) => {
    requireTool(context, "zstd");
    await writeFile(image, make());
    const refusal = await restoreRefusal(VOLNAME);
    // What the tables do not tell is for the digest, or for whoever reads the data.
    if (stage !== "read") expect(refusal).toMatch(/drive-scsi0\.qcow2/);
    expect(await asked.nextMode(MIB)).toBe(refusal === undefined ? "use" : "new");
    await writeFile(image, new Handmade().bytes);
  });

  it.each(REFUSED_BEFORE)(
    "does not restore or build on $name, also with a manifest that fits it",
    async ({ make, stage }) => {
      const bytes = make();
      await writeFile(image, bytes);
      await forge(bytes);
      expect(await restoreRefusal(VOLNAME)).toContain(image);
      const sizeBytes = Math.min(Number.MAX_SAFE_INTEGER, Number(bytes.readBigUInt64BE(24)));
      expect(await asked.nextMode(sizeBytes)).toBe("new");
      const decision = await decide(store, { sizeBytes, guest: { vmgenid: VMGENID } });
      // The store looks at headers and chains; the tables are for the provider, which has answered above.
      if (stage === "check") return expect(decision).toBe("use 100/qemu-1700000000");
      expect(decision).toMatch(/^base damaged: /);
      expect(decision).toContain(image);
    },
  );

  it.each(REFUSED_BEFORE)("does not restore $name from a folder of the upstream example", async ({ make }) => {
    const path = join(await makeLegacy(lab, "qemu-200", { [DEVICE]: make() }), `${DEVICE}.qcow2`);
    expect(await restoreRefusal("backup/100/qemu-200")).toContain(path);
  });

  it.for(REFUSED_AT_READ)(
    "offers $name, and nothing of it gets beyond its cluster",
    async ({ name, make }, context) => {
      requireTool(context, "qemu-storage-daemon", "zstd");
      await writeFile(image, make());
      await forge(make());
      const read = readOffered(VOLNAME).then(
        (bytes) => (bytes.every((byte) => byte === 0) ? "zeroes" : "bytes"),
        (error: NodeJS.ErrnoException) => error.code,
      );
      // Of a zlib stream QEMU takes what fits and leaves the rest alone.
      expect(await read).toBe(name.startsWith("a zlib") ? "zeroes" : "EIO");
    },
  );
});
