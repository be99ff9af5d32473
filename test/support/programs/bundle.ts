// SPDX-License-Identifier: AGPL-3.0-or-later
// Programs of this checkout, and of its tests, as bundles that a separate Node can start.
import { randomUUID } from "node:crypto";
import { copyFile, mkdir, rm } from "node:fs/promises";
import path from "node:path";
import { build } from "esbuild";

const root = path.resolve(import.meta.dirname, "../../..");

/** Names the bridge bundle that was built for the whole run: see build-once.ts. */
export const BUILT_BRIDGE = "PBH_TEST_BUILT_BRIDGE";

/** Bundles a program as a release does. @param entryPoint below the project's root */
export async function bundleInto(outfile: string, entryPoint: string): Promise<void> {
  const built = process.env[BUILT_BRIDGE];
  if (built !== undefined && entryPoint === "bridge/main.ts") {
    await mkdir(path.dirname(outfile), { recursive: true });
    return await copyFile(built, outfile);
  }
  await build({
    ...{ absWorkingDir: root, entryPoints: [entryPoint], outfile, bundle: true, platform: "node" },
    ...{ format: "esm", target: "node20.19", external: ["koffi"], logLevel: "warning" },
    banner: {
      js: 'import { createRequire as __createRequire } from "node:module"; const require = __createRequire(import.meta.url);',
    },
  });
}

export interface Bundle extends AsyncDisposable {
  readonly path: string;
}

/** The same, kept below dist/, where it finds its native libraries, until disposed. */
export async function buildProgram(entryPoint: string): Promise<Bundle> {
  const file = path.join(root, "dist/test", `${path.basename(entryPoint, ".ts")}-${process.pid}-${randomUUID()}.mjs`);
  await bundleInto(file, entryPoint);
  return { path: file, [Symbol.asyncDispose]: () => rm(file, { force: true }) };
}
