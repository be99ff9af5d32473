// SPDX-License-Identifier: AGPL-3.0-or-later
// The archiver of a container's backup, which under PVE works in the container's user namespace; tools play it here.
import { runTool } from "../../../fixtures/lab/index.ts";
import type { HandleToOpen } from "../../../src/provider/index.ts";
import { takeHandoff } from "./take-handoff.ts";

const GUEST_CONFIG = "hostname: ct\n";

/** What the Perl side opens for `backupContainerPrepare`. */
interface Handoff {
  readonly archivePath: string;
  readonly socketPath: string;
  readonly token: string;
}

export function handoffOf([file, socket]: readonly HandleToOpen[]): Handoff {
  if (file?.kind !== "file" || socket?.kind !== "socket") throw new Error("not a file and a socket");
  const { token } = JSON.parse(socket.firstLine ?? "{}") as { token: string };
  return { archivePath: file.path, socketPath: socket.path, token };
}

/** Fills the archive with `write`, and commits it. @throws the error with which the provider refuses it */
export async function playArchiver(
  handles: readonly HandleToOpen[],
  write: (archive: string) => Promise<void>,
  guestConfig = GUEST_CONFIG,
): Promise<void> {
  const { archivePath, socketPath, token } = handoffOf(handles);
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
