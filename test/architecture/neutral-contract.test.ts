// SPDX-License-Identifier: AGPL-3.0-or-later
// No word of one provider stands in what every provider shares.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const root = path.resolve(import.meta.dirname, "../..");
const filesOf = (folder: string): string[] =>
  readdirSync(path.join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts"))
    .map((name) => path.join(folder, name));

const SHARED = [
  "bridge/protocol.schema.json",
  ...["Handoff.pm", "Provider.pm", "Refusals.pm", "StoragePlugin.pm", "Values.pm"].map(
    (name) => `perl-shim/PVE/BackupProvider/Bridge/${name}`,
  ),
  ...filesOf("src/provider"),
  ...filesOf("src/core"),
];
/** Of the directory provider: its formats, its files, its names. PVE's own word "directory" is a mechanism. */
const FOREIGN =
  /qcow2|squashfs|manifest|\bpoints?\b|DirectoryExample|dir-example|directory provider|\bdir-[a-z]+|\(qemu\|lxc\)-|token/i;
/** "tar" is the name of one of PVE's mechanisms: quoted, or as the key `tar-path`. */
const TAR = /\btar\b(?!-path|["'])(?<!["']tar)/i;

describe("the neutral contract", () => {
  it.each(SHARED)("%s has no word of one provider", (file) => {
    const lines = readFileSync(path.join(root, file), "utf8").split("\n");
    expect(lines.filter((line) => FOREIGN.test(line) || TAR.test(line.replace("qw(tar-path", "")))).toEqual([]);
  });
});
