// SPDX-License-Identifier: AGPL-3.0-or-later
// One module reaches into the store: src/host/folder.ts, by descriptors. Everybody else gets a Folder or an open file
// from it. What else opens files by path is listed here, with what it opens: never anything of the store.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");

/** File -> the paths it uses with node:fs. */
const USERS: Readonly<Record<string, string>> = {
  "src/host/folder.ts": "the store, through descriptors",
  "src/host/open-root.ts": "the store's own path, component by component",
  "src/host/regular-file.ts": "files of the node; files that are open already",
  "src/host/process-identity.ts": "/proc, /etc/machine-id",
  "src/store/witness.ts": "/etc/pve/priv, /var/lib",
  "src/store/sound-memory.ts": "/var/cache",
  "src/qcow2/compressor.ts": "this program's own worker",
  "src/archive/compressor.ts": "PATH",
  "src/archive/decompressor.ts": "a pipe",
  "src/archive/exclude-scan.ts": "the container's files",
  "src/archive/pipe.ts": "a pipe",
  "src/archive/progress.ts": "/proc",
  "src/archive/scratch-file.ts": "the temporary folder",
  "src/archive/squashfs.ts": "the container's files; an open file",
  "src/archive/tar.ts": "an open file",
  "src/directory/container/container-archive.ts": "an open file",
  "src/directory/container/container-archiver.ts": "/proc",
  "src/directory/container/container-handoff.ts": "the folder for sockets",
  "src/directory/container/container-restore.ts": "the folder for mounts",
  "src/cli/backup-name.ts": "a path on the command line: made a name, never opened",
  "src/cli/output.ts": "standard output and standard error",
  "src/nbd/server.ts": "the folder for its socket",
  "src/source/fuse-file.ts": "/proc/PID/fd: a file of nbdfuse",
};

/** Mounts, sockets and reservations of the node: /run, /dev, /sys, /proc. It gets open files for what is in the store. */
const DEVICE = /^src\/device\//;

/** True if the file imports something of node:fs that is there at run time. */
function usesFiles(file: string): boolean {
  const text = readFileSync(path.join(root, file), "utf8");
  for (const [, names = ""] of text.matchAll(
    /import\s+(type\s+\{[^}]*\}|\{[^}]*\}|[\w*\s]+)\s+from\s+"node:fs(?:\/promises)?"/g,
  )) {
    if (names.startsWith("type")) continue;
    const bindings = names.replace(/[{}]/g, "").split(",");
    if (bindings.some((one) => one.trim() !== "" && !one.trim().startsWith("type ") && one.trim() !== "constants"))
      return true;
  }
  return /require\("(?:node:)?fs|import\("(?:node:)?fs|process\.binding/.test(text);
}

it("no module but src/host opens files of the store", () => {
  const files = ["src", "bridge"].flatMap((folder) =>
    readdirSync(path.join(root, folder), { recursive: true, encoding: "utf8" })
      .filter((name) => name.endsWith(".ts"))
      .map((name) => path.join(folder, name)),
  );
  expect(files.length).toBeGreaterThan(100);
  const users = files.filter(usesFiles).filter((file) => !DEVICE.test(file));
  expect(users.sort()).toEqual(Object.keys(USERS).sort());
});
