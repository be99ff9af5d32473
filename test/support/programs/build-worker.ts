// SPDX-License-Identifier: AGPL-3.0-or-later
// Builds the compression worker that tests run from sources need. A vitest global setup.
import { rename } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const root = fileURLToPath(new URL("../../../", import.meta.url));

/** Replaces the file in one step: another run may be reading it. */
export async function setup(): Promise<void> {
  const target = `${root}dist/compress-worker.cjs`;
  const partial = `${target}.${process.pid}`;
  await build({
    entryPoints: [`${root}src/qcow2/compress-worker.ts`],
    outfile: partial,
    bundle: true,
    platform: "node",
    target: "node20.19",
    format: "cjs",
    external: ["koffi"],
    logLevel: "warning",
  });
  await rename(partial, target);
}
