// SPDX-License-Identifier: AGPL-3.0-or-later
// Bundles the bridge around the test double, for perl-shim/t and the bridge's own tests.
import path from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), "..");
await build({
  absWorkingDir: root,
  entryPoints: ["test/support/bridge/fake-bridge.ts"],
  outfile: process.argv[2] ?? "dist/test/fake-bridge.mjs",
  bundle: true,
  platform: "node",
  format: "esm",
  target: "node20.19",
  external: ["koffi"],
  minifySyntax: true,
  logLevel: "warning",
  banner: {
    js: 'import { createRequire as __createRequire } from "node:module"; const require = __createRequire(import.meta.url);',
  },
});
