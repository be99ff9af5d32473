// SPDX-License-Identifier: AGPL-3.0-or-later
// A chain that cannot be opened when the time has come must not be promised before: QEMU would be asked for the
// changes since its top again and again.
import { stat } from "node:fs/promises";
import { expect, it } from "vitest";
import { Qcow2Writer } from "../../../src/qcow2/index.ts";
import type { Point, Store } from "../../../src/store/index.ts";
import { createLab, holdBase, NEVER } from "../../unit/store/lab.ts";
import { AskedProvider, DEVICE, GUEST_CONFIG } from "./asked-provider.ts";

/** The L1 table of such a disk has 16 MiB, and 256 are the most that a chain may have. */
const DISK_BYTES = 2 ** 50;
const IMAGES_THAT_FIT = 16;

async function commitEmpty(store: Store, epoch: number, base: Point | undefined): Promise<Point> {
  await using lock = await store.lockGuest(100, NEVER);
  await using staged = await store.beginPoint({ lock, type: "qemu", epoch, signal: NEVER });
  await staged.writeFile("guest.conf", Buffer.from(GUEST_CONFIG));
  const file = staged.newFile(`${DEVICE}.qcow2`);
  const backing =
    base === undefined ? undefined : { file: `../${base.folderName}/${DEVICE}.qcow2`, format: "qcow2" as const };
  await using image = await Qcow2Writer.create({
    ...{ file, virtualBytes: DISK_BYTES, backing, compression: "none", compressor: undefined, signal: NEVER },
  });
  const { digest, fileBytes } = await image.finish();
  const counts = { readBytes: 0, writtenBytes: fileBytes, zeroBytes: 0, fileBytes };
  const device = {
    name: DEVICE,
    virtualBytes: DISK_BYTES,
    reason: "",
    compression: "none",
    digest,
    ...counts,
  } as const;
  const devices = [{ ...device, isIncremental: base !== undefined }];
  await using held = base === undefined ? undefined : await holdBase(store, base);
  expect((await stat(file.path)).size).toBe(fileBytes);
  return await staged.commit({ devices, base: held, process: undefined }, NEVER);
}

it("a chain whose L1 tables are too large together is not built on", async () => {
  await using lab = await createLab();
  const store = await lab.open();
  await using asked = await AskedProvider.open(lab);
  let top: Point | undefined;
  for (let image = 0; image < IMAGES_THAT_FIT; image++) top = await commitEmpty(store, 1_700_000_000 + image, top);
  expect(await asked.nextMode(DISK_BYTES)).toBe("use");
  await commitEmpty(store, 1_700_000_000 + IMAGES_THAT_FIT, top);
  expect(await asked.nextMode(DISK_BYTES)).toBe("new");
}, 120_000);
