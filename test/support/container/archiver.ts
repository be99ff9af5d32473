// SPDX-License-Identifier: AGPL-3.0-or-later
// The archiver of a container's backup, which under PVE works in the container's user namespace: played by the tools.
import { runTool } from "../../../fixtures/lab/index.ts";
import { takeHandoff } from "../../../src/directory/container/container-handoff.ts";
import type { ContainerHandoff } from "../../../src/provider/index.ts";

const GUEST_CONFIG = "hostname: ct\n";

/** Fills the archive with `write`, and commits it. @throws what the provider refuses it with */
export async function playArchiver(
  { archivePath, socketPath, token }: ContainerHandoff,
  write: (archive: string) => Promise<void>,
  guestConfig = GUEST_CONFIG,
): Promise<void> {
  using channel = await takeHandoff(socketPath, token);
  await write(archivePath);
  const config = Buffer.from(guestConfig).toString("base64");
  channel.send({ commit: { files: 1, bytes: 1, warnings: 0, "guest-config": config } });
  for (let message = await channel.next(); message?.ok !== true; message = await channel.next()) {
    if (message === undefined || message.error !== undefined) throw new Error(JSON.stringify(message));
  }
}

export async function packTree(mode: "tar" | "squashfs", tree: string, archive: string): Promise<void> {
  if (mode === "tar") await runTool("tar", ["cf", archive, "-C", tree, "."]);
  else await runTool("mksquashfs", [tree, archive, "-noappend", "-quiet", "-no-progress"]);
}
