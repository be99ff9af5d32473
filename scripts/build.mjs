// SPDX-License-Identifier: AGPL-3.0-or-later
// Bundles every program into one file, so that a package upgrade in mid-job changes nothing.
import { chmod, cp, mkdir, readdir } from "node:fs/promises";
import path from "node:path";
import { build } from "esbuild";

const shared = {
  bundle: true,
  platform: "node",
  target: "node20.19",
  external: ["koffi"],
  minifySyntax: true,
  legalComments: "none",
  logLevel: "warning",
};
// Bundled CommonJS packages call require(); an ES module has none of its own.
const requireBanner =
  'import { createRequire as __createRequire } from "node:module"; const require = __createRequire(import.meta.url);';

await mkdir("dist", { recursive: true });
await build({
  ...shared,
  entryPoints: ["src/qcow2/compress-worker.ts"],
  format: "cjs",
  outfile: "dist/compress-worker.cjs",
});
const programs = [
  ["bridge/main.ts", "dist/bridge.mjs"],
  ["src/cli/main.ts", "dist/cli.mjs"],
  ["fixtures/demo/demo.ts", "dist/demo.mjs"],
  ["test/bench/main.ts", "dist/bench.mjs"],
  ["test/bench/job.ts", "dist/bench-job.mjs"],
  ["test/vm/main.ts", "dist/test-vm.mjs"],
  ["test/vm/guest/main.ts", "dist/test-vm-guest.mjs"],
];
for (const [entry, outfile] of programs) {
  await build({
    ...shared,
    entryPoints: [entry],
    format: "esm",
    outfile,
    banner: { js: requireBanner },
  });
}
await chmod("dist/cli.mjs", 0o755);
await copyKoffi();

/** koffi is a native addon: its loader and this machine's binary travel beside the bundles. */
async function copyKoffi() {
  for (const name of ["koffi", ...(await readdir("node_modules/@koromix")).map((binary) => `@koromix/${binary}`)]) {
    const from = path.join("node_modules", name);
    const to = path.join("dist/node_modules", name);
    await cp(from, to, {
      recursive: true,
      filter: (file) => !/\/(vendor|doc|musl_[^/]*)(\/|$)|\.(md|cc|hh|inc|S|asm)$/.test(file.slice(from.length)),
    });
  }
}
