// SPDX-License-Identifier: AGPL-3.0-or-later
// Builds what most tests start, once for the whole run: the compression worker and the bridge. This is a vitest
// global setup.
import { rename, rm } from "node:fs/promises";
import path from "node:path";
import { build } from "esbuild";
import { BUILT_BRIDGE, bundleInto } from "./bundle.ts";

const root = path.resolve(import.meta.dirname, "../../..");
const bridge = path.join(root, `dist/test/bridge-${process.pid}.mjs`);

export async function setup(): Promise<void> {
  await buildWorker();
  await bundleInto(bridge, "bridge/main.ts");
  process.env[BUILT_BRIDGE] = bridge; // the workers inherit it
}

export async function teardown(): Promise<void> {
  await rm(bridge, { force: true });
}

/** Replaces the file in one step: another run may be reading it. */
async function buildWorker(): Promise<void> {
  const target = path.join(root, "dist/compress-worker.cjs");
  const partial = `${target}.${process.pid}`;
  await build({
    entryPoints: [path.join(root, "src/qcow2/compress-worker.ts")],
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
