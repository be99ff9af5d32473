// SPDX-License-Identifier: AGPL-3.0-or-later
// A commit sequence far above the points' own, whoever wrote it, must not be the end of a guest's backups.
import { cp, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { expect, it } from "vitest";
import { seededBytes } from "../../fixtures/lab/index.ts";
import { TestNode } from "../support/node/test-node.ts";
import { DISK, expectRestores, MIB, mustBackUp, startGuest } from "../support/vm/vm-rules.ts";

/** The largest one that a manifest may hold. */
const HIGHEST = 2 ** 40;

const plants: ReadonlyArray<readonly [string, RegExp, (folder: string) => Promise<void>]> = [
  [
    "state.json",
    /^warn: .*(state\.json|sequence)/m,
    (folder) => setFields(`${folder}/state.json`, { sequence: HIGHEST }),
  ],
  [
    "the manifest of a planted copy",
    /^warn: .*qemu-1500/m,
    async (folder) => {
      await cp(`${folder}/qemu-1000`, `${folder}/qemu-1500`, { recursive: true });
      const uuid = "00000000-1111-4222-8333-444444444444";
      await setFields(`${folder}/qemu-1500/manifest.json`, { uuid, epoch: 1500, sequence: HIGHEST });
    },
  ],
];

it.each(plants)("a sequence of 2^40 in %s is warned of, and backups go on", async (_where, warning, plant) => {
  await using node = await TestNode.create();
  await using guest = await startGuest(node);
  const first = await mustBackUp(node, guest, { epoch: 1000 });
  await plant(path.join(node.storePath, "100"));
  await guest.write(DISK, 8 * MIB, seededBytes("second", MIB));
  const second = await mustBackUp(node, guest, { epoch: 2000 });
  expect(second.job.log.join("\n")).toMatch(warning);
  await guest.write(DISK, 16 * MIB, seededBytes("third", MIB));
  const third = await mustBackUp(node, guest, { epoch: 3000 });
  await expectRestores(node, first, second, third);
});

async function setFields(file: string, fields: Record<string, unknown>): Promise<void> {
  const value = JSON.parse(await readFile(file, "utf8")) as Record<string, unknown>;
  await writeFile(file, `${JSON.stringify({ ...value, ...fields }, null, 2)}\n`);
}
