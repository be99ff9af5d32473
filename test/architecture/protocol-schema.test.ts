// SPDX-License-Identifier: AGPL-3.0-or-later
// Holds together the schema, what is generated from it, the code, and docs/rpc-protocol.md.
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";
import { PROTOCOL_VERSION } from "../../bridge/dispatcher.ts";
import { RPC_ERROR_NUMBERS } from "../../bridge/error-map.ts";
import { PROVIDER_METHODS } from "../../bridge/methods.ts";

interface Part {
  readonly description?: string;
  readonly properties?: Readonly<Record<string, Part>>;
}
interface Method {
  readonly description: string;
  readonly params: Part;
  readonly result?: Part & { readonly anyOf?: readonly Part[] };
}

const root = new URL("../../", import.meta.url);
const schema = JSON.parse(readFileSync(new URL("bridge/protocol.schema.json", root), "utf8"));
const page = readFileSync(new URL("docs/rpc-protocol.md", root), "utf8");
const methods = schema["x-methods"] as Record<string, Method>;
const others = { ...schema["x-reverse-methods"], ...schema["x-notifications"] } as Record<string, Method>;

/** The text below the heading of a method, up to the next heading. */
function sectionOf(method: string): string {
  const section = page.split(/^#+ /m).find((text) => text.startsWith(`\`${method}\`\n`));
  return section ?? "";
}

function keysOf({ params, result }: Method): string[] {
  const parts = [params, ...(result?.anyOf ?? [result ?? {}])];
  return parts.flatMap((part) => Object.keys(part.properties ?? {}));
}

/** Names in backticks in the first column of a table. */
function firstColumn(text: string): string[] {
  return [...text.matchAll(/^\| `([^`]+)`/gm)].map(([, name]) => name ?? "");
}

describe("protocol.schema.json", () => {
  it("is what the compiled validators were made from", async () => {
    const script = new URL("scripts/compile-validators.mjs", root).pathname;
    await expect(promisify(execFile)(process.execPath, [script, "--check"])).resolves.toBeDefined();
  });

  it("has exactly the methods that the code serves", () => {
    const served = [...Object.keys(PROVIDER_METHODS), "initialize", "shutdown"];
    expect(Object.keys(methods).sort()).toEqual(served.sort());
  });

  it("has exactly the error codes of the code, each number once", () => {
    const numbers = Object.entries(schema["x-errors"] as Record<string, { code: number }>).map(([k, v]) => [k, v.code]);
    expect(Object.fromEntries(numbers)).toEqual(RPC_ERROR_NUMBERS);
    expect(new Set(numbers.map(([, code]) => code)).size).toBe(numbers.length);
  });

  it("has the version of the code", () => {
    expect(schema["x-protocol-version"]).toBe(PROTOCOL_VERSION);
  });
});

describe("docs/rpc-protocol.md", () => {
  it.each(Object.entries({ ...methods, ...others }))(
    "describes %s with each of its keys, and no others",
    (name, method) => {
      const section = sectionOf(name);
      expect(section).toContain(method.description);
      expect(firstColumn(section).sort()).toEqual(keysOf(method).sort());
    },
  );

  it("has no section for a method that the protocol does not have", () => {
    const headings = [...page.matchAll(/^#+ `([a-z_]+)`$/gm)].map(([, name]) => name ?? "");
    expect(headings.sort()).toEqual(Object.keys({ ...methods, ...others }).sort());
  });

  it("lists each error code with its number, and no others", () => {
    const table = page.split(/^## /m).find((text) => text.startsWith("Errors\n")) ?? "";
    const rows = [...table.matchAll(/^\| `([A-Z0-9_]+)` \| (-\d+) \|/gm)].map(([, name, code]) => [name, Number(code)]);
    expect(Object.fromEntries(rows)).toEqual(RPC_ERROR_NUMBERS);
  });

  it("names the version", () => {
    expect(page).toContain(`Protocol version: ${PROTOCOL_VERSION}`);
  });
});
