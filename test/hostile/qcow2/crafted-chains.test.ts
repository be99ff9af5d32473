// SPDX-License-Identifier: AGPL-3.0-or-later
// Chains made to hurt: without an end, in a circle, too long, or together too large for memory.
import { createHash, randomUUID } from "node:crypto";
import { truncateSync, writeFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Store } from "../../../src/store/index.ts";
import { openChain } from "../../support/qcow2/open-images.ts";
import { scratchDir } from "../../support/qcow2/qcow2-images.ts";
import { refusalOf } from "../../support/vm/vm-rules.ts";
import { createLab, type Lab, makeLegacy, NEVER, resolveChain } from "../../unit/store/lab.ts";
import { Handmade, MIB } from "./handmade.ts";

const DEVICE = "drive-scsi0";
const SMALL = { clusterBits: 9, virtualBytes: 16384 };

interface ForgedPoint {
  readonly epoch: number;
  readonly uuid: string;
  readonly sequence: number;
  readonly base?: { readonly epoch: number; readonly uuid: string };
}

/** A folder with a manifest, as whoever can write to the store may make it. */
async function forgePoint(lab: Lab, { epoch, uuid, sequence, base }: ForgedPoint): Promise<void> {
  const folder = join(lab.path, `100/qemu-${epoch}`);
  await mkdir(folder, { recursive: true });
  const backing = base === undefined ? {} : { backing: `../qemu-${base.epoch}/${DEVICE}.qcow2` };
  const { bytes } = new Handmade({ ...SMALL, ...backing });
  await writeFile(join(folder, `${DEVICE}.qcow2`), bytes);
  await writeFile(join(folder, "guest.conf"), "memory: 512\n");
  const device = {
    ...{ name: DEVICE, file: `${DEVICE}.qcow2`, virtualBytes: SMALL.virtualBytes, compression: "none", reason: "" },
    ...{ mode: base === undefined ? "full" : "incremental", readBytes: 0, writtenBytes: 0, zeroBytes: 0 },
    ...(base === undefined ? {} : { base: { folder: `qemu-${base.epoch}`, uuid: base.uuid } }),
    headerSha256: createHash("sha256").update(bytes.subarray(0, 65536)).digest("hex"),
  };
  const manifest = {
    ...{ format: "pve-backup-host-manifest", version: 1, uuid, sequence, vmid: 100, type: "qemu", epoch },
    ...{ storeid: "bk", nodename: "pve1", committedAt: "2025-01-01T00:00:00.000Z", guest: {}, devices: [device] },
    files: [
      { name: "guest.conf", sizeBytes: 12 },
      { name: `${DEVICE}.qcow2`, sizeBytes: bytes.length },
    ],
  };
  await writeFile(join(folder, "manifest.json"), JSON.stringify(manifest));
}

async function refusal(store: Store, epoch: number): Promise<string> {
  const point = await store.openPoint(`100/qemu-${epoch}`, NEVER);
  return (await refusalOf(resolveChain(store, point, DEVICE, NEVER))).message;
}

const legacyImage = (backing: string): Buffer => new Handmade({ ...SMALL, backing }).bytes;

describe("a chain of the upstream example's folders", () => {
  it("in a circle is refused", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    for (const [folder, base] of [
      [1, 2],
      [2, 3],
      [3, 1],
    ]) {
      await makeLegacy(lab, `qemu-${folder}`, { [DEVICE]: legacyImage(`/x/qemu-${base}/${DEVICE}.qcow2`) });
    }
    await makeLegacy(lab, "qemu-4", { [DEVICE]: legacyImage(`/x/qemu-4/${DEVICE}.qcow2`) });
    expect(await refusal(store, 1)).toMatch(/qemu-1\/drive-scsi0\.qcow2": it is its own base$/);
    expect(await refusal(store, 4)).toMatch(/qemu-4\/drive-scsi0\.qcow2": it is its own base$/);
  });

  it("of 300 images is refused", async () => {
    await using lab = await createLab();
    const store = await lab.open();
    for (let epoch = 1; epoch <= 300; epoch++) {
      const bytes = epoch === 1 ? new Handmade(SMALL).bytes : legacyImage(`/x/qemu-${epoch - 1}/${DEVICE}.qcow2`);
      await makeLegacy(lab, `qemu-${epoch}`, { [DEVICE]: bytes });
    }
    expect(await refusal(store, 300)).toMatch(
      /^Cannot use "backup\/100\/qemu-300": its chain has more than 256 images$/,
    );
    const shorter = await resolveChain(store, await store.openPoint("100/qemu-256", NEVER), DEVICE, NEVER);
    expect(shorter.paths).toHaveLength(256);
  }, 180_000);

  it.each([
    ["/etc/shadow", /names backing file "\/etc\/shadow", which is not a disk of this guest$/],
    ["../../101/qemu-1/../../../../etc/shadow", /which is not a disk of this guest$/],
    ["json:{}", /which is not a disk of this guest$/],
    [`json:{"file":"/qemu-9/${DEVICE}.qcow2`, /qemu-9\/drive-scsi0\.qcow2": it is missing$/],
    [`/another/store/777/qemu-9/${DEVICE}.qcow2`, /100\/qemu-9\/drive-scsi0\.qcow2": it is missing$/],
  ])("that leads to %s stays in the guest's folder", async (backing, says) => {
    await using lab = await createLab();
    await makeLegacy(lab, "qemu-1", { [DEVICE]: legacyImage(backing) });
    expect(await refusal(await lab.open(), 1)).toMatch(says);
  });
});

describe("a chain of forged manifests", () => {
  it("in a circle is refused", async () => {
    await using lab = await createLab();
    const [one, two] = [randomUUID(), randomUUID()];
    await forgePoint(lab, { epoch: 1, uuid: one, sequence: 1, base: { epoch: 2, uuid: two } });
    await forgePoint(lab, { epoch: 2, uuid: two, sequence: 2, base: { epoch: 1, uuid: one } });
    const store = await lab.open();
    expect(await refusal(store, 2)).toBe('Cannot use "backup/100/qemu-1": its base qemu-2 is not older than it');
  });

  it("of 300 images is refused", async () => {
    await using lab = await createLab();
    let base: ForgedPoint["base"];
    for (let epoch = 1; epoch <= 300; epoch++) {
      const uuid = randomUUID();
      await forgePoint(lab, { epoch, uuid, sequence: epoch, ...(base === undefined ? {} : { base }) });
      base = { epoch, uuid };
    }
    const store = await lab.open();
    expect(await refusal(store, 300)).toMatch(/its chain has more than 256 images$/);
    const shorter = await resolveChain(store, await store.openPoint("100/qemu-256", NEVER), DEVICE, NEVER);
    expect(shorter.paths).toHaveLength(256);
  }, 180_000);
});

describe("openChain()", () => {
  it("refuses L1 tables that are too large together", async () => {
    using dir = scratchDir();
    const paths: string[] = [];
    for (let index = 0; index < 9; index++) {
      // 32 MiB of L1 entries each, all of them a hole: a disk of 128 GiB in clusters of 512 bytes.
      const image = new Handmade({ ...SMALL, ...(index < 8 ? { backing: "base" } : {}) });
      const l1Offset = image.bytes.length;
      image
        .u64(24, BigInt(128 * 1024 * MIB))
        .u32(36, 4 * MIB)
        .u64(40, BigInt(l1Offset));
      const path = dir.file(`image-${index}`);
      writeFileSync(path, image.bytes);
      truncateSync(path, l1Offset + 32 * MIB);
      paths.push(path);
    }
    const { message } = await refusalOf(openChain(paths, NEVER));
    expect(message).toMatch(/^Cannot open chain: with ".*image-8" its L1 tables have 301989888 bytes, too many$/);
    await using fewer = await openChain([...paths.slice(0, 7), paths[8] ?? ""], NEVER);
    expect(fewer.headers).toHaveLength(8);
  });
});
