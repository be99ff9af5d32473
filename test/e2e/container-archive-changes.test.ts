// SPDX-License-Identifier: AGPL-3.0-or-later
// The archive of a container that is not, or no longer, what was looked at when its restore began.
import { appendFileSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { backUpContainer, CT_VMID } from "../support/container/container-point.ts";
import { onOpen, resetFileHooks } from "../support/fault/file-hooks.ts";
import { TestNode } from "../support/node/test-node.ts";
import { requireTool } from "../support/programs/tools.ts";
import { never, refusalOf } from "../support/vm/vm-rules.ts";

beforeEach((context) => requireTool(context, "tar", "mksquashfs", "unsquashfs"));
afterEach(resetFileHooks);

describe.each(["tar", "sqfs"] as const)("an archive (%s)", (format) => {
  const archiveOf = (node: TestNode): string => path.join(node.storePath, `${CT_VMID}/lxc-1000/archive.${format}`);

  it("that is written to while it is restored fails the restore", async () => {
    await using node = await TestNode.create();
    const volname = await backUpContainer(node, { epoch: 1000, format });
    await using provider = node.provider();
    await provider.restore.restoreContainerInit(volname, never);
    const bytes = readFileSync(archiveOf(node));
    writeFileSync(archiveOf(node), bytes.fill(1, bytes.length / 2), { flag: "r+" });
    expect(await refusalOf(provider.restore.restoreContainerCleanup(volname))).toMatchObject({
      code: "DAMAGED",
      message: `Cannot use "${archiveOf(node)}": it was changed while it was in use`,
    });
  });

  it("that takes the place of the recorded one before it is opened is not restored", async () => {
    await using node = await TestNode.create();
    const volname = await backUpContainer(node, { epoch: 1000, format });
    await using provider = node.provider();
    const hasCome = onOpen(
      (name) => name.endsWith(`/archive.${format}`),
      () => {
        const other = `${archiveOf(node)}.new`;
        writeFileSync(other, readFileSync(archiveOf(node)));
        appendFileSync(other, Buffer.alloc(4096));
        renameSync(other, archiveOf(node));
      },
    );
    const { code, message } = await refusalOf(provider.restore.restoreContainerInit(volname, never));
    expect(hasCome()).toBe(true);
    expect(code).toBe("DAMAGED");
    expect(message).toMatch(/: it has \d+ bytes, expected \d+$/);
  });
});
