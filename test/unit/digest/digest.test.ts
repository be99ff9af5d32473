// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { describe, expect, it } from "vitest";
import { type DigestAlgorithm, tryCreateDigester } from "../../../src/digest/digest.ts";
import { requireTool } from "../../support/programs/tools.ts";

const text = Buffer.from("Every listed backup restores bit for bit.\n".repeat(5000));

describe("tryCreateDigester()", () => {
  it.for([
    ["xxh3-128", "xxhsum", ["-H2"]],
    ["sha256", "sha256sum", []],
  ] satisfies Array<[DigestAlgorithm, string, string[]]>)(
    "%s agrees with %s, whatever the pieces",
    ([algorithm, tool, args], context) => {
      requireTool(context, tool);
      const expected = execFileSync(tool, [...args], { input: text, encoding: "utf8" }).split(" ")[0];
      for (const piece of [1, 7, 4096, text.length]) {
        const digester = tryCreateDigester(algorithm);
        for (let at = 0; at < text.length; at += piece) digester?.update(text.subarray(at, at + piece));
        expect(digester?.finish()).toEqual({ algorithm, value: expected });
      }
    },
  );
});
