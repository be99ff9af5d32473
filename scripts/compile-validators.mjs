// SPDX-License-Identifier: AGPL-3.0-or-later
// Compiles bridge/protocol.schema.json to bridge/generated/: compiling at run time would cost every
// start of the bridge more than Node itself. `--check` only says whether the result is up to date.
import { mkdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { Ajv } from "ajv";
import standalone from "ajv/dist/standalone/index.js";
import { build } from "esbuild";

const bridge = path.join(path.dirname(fileURLToPath(import.meta.url)), "..", "bridge");
const schema = JSON.parse(await readFile(path.join(bridge, "protocol.schema.json"), "utf8"));

/** Every schema that gets a validator, by the name of its export. */
function* schemas() {
  for (const group of ["x-methods", "x-reverse-methods", "x-notifications"]) {
    for (const [method, { params, result }] of Object.entries(schema[group])) {
      yield [`${method}_params`, params];
      if (result !== undefined) yield [`${method}_result`, result];
    }
  }
}

/** "#/definitions/x" of the protocol, seen from another schema. */
function absolute(value) {
  return JSON.parse(JSON.stringify(value).replaceAll('"#/definitions/', '"protocol#/definitions/'));
}

async function generate() {
  const ajv = new Ajv({
    strict: true,
    strictTypes: false,
    strictRequired: false,
    allowUnionTypes: true,
    code: { source: true, esm: true },
    schemas: [{ $id: "protocol", definitions: schema.definitions }],
  });
  const exported = {};
  for (const [name, part] of schemas()) {
    ajv.addSchema({ $id: name, ...absolute(part) });
    exported[name] = name;
  }
  const contents = standalone.default(ajv, exported);
  // The generated code calls require() for ajv's helpers: bundle them.
  const bundle = await build({
    stdin: { contents, resolveDir: path.join(bridge, ".."), loader: "js" },
    bundle: true,
    write: false,
    format: "esm",
    target: "node20.19",
    minify: true,
    legalComments: "none",
  });
  const head = "// Made by scripts/compile-validators.mjs from bridge/protocol.schema.json.\n";
  const names = Object.keys(exported);
  return new Map([
    ["validators.mjs", head + bundle.outputFiles[0].text],
    [
      "validators.d.mts",
      `${head}import type { ValidateFunction } from "ajv";\n${names.map((name) => `export const ${name}: ValidateFunction;\n`).join("")}`,
    ],
  ]);
}

const files = await generate();
await mkdir(path.join(bridge, "generated"), { recursive: true });
for (const [name, text] of files) {
  const file = path.join(bridge, "generated", name);
  const present = await readFile(file, "utf8").catch(() => undefined);
  if (present === text) continue;
  if (process.argv.includes("--check")) {
    console.error(`bridge/generated/${name} is not up to date: run node scripts/compile-validators.mjs`);
    process.exitCode = 1;
  } else {
    await writeFile(file, text);
  }
}
