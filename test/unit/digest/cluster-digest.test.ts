// SPDX-License-Identifier: AGPL-3.0-or-later
import { execFileSync } from "node:child_process";
import { expect, it } from "vitest";
import { createClusterDigester } from "../../../src/digest/cluster-digest.ts";
import { requireTool } from "../../support/programs/tools.ts";

/** The secret that XXH3 uses where it is given none. Source: xxhash.h, XXH3_kSecret. */
const DEFAULT_SECRET = Buffer.from(
  "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221" +
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8" +
    "fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb17" +
    "0ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e",
  "hex",
);

const cluster = Buffer.from("one cluster of a disk ".repeat(3000)).subarray(0, 65536);

function digestOf(bytes: Buffer, secret: Buffer): string {
  const target = Buffer.alloc(20, 0xee);
  createClusterDigester(secret)?.(bytes, target, 2);
  expect([target.readUInt16BE(0), target.readUInt16BE(18)]).toEqual([0xeeee, 0xeeee]);
  return target.toString("hex", 2, 18);
}

it("is what xxhsum prints, under the secret that xxhsum uses", (context) => {
  requireTool(context, "xxhsum");
  const printed = execFileSync("xxhsum", ["-H2"], { input: cluster, encoding: "utf8" });
  expect(digestOf(cluster, DEFAULT_SECRET)).toBe(printed.split(/\s/)[0]);
});

it("is another one under another secret, and for another byte", () => {
  const other = Buffer.from(cluster);
  other.writeUInt8(other.readUInt8(40_000) ^ 1, 40_000);
  const secret = Buffer.alloc(192, "a random secret of a chain ");
  expect(digestOf(cluster, secret)).not.toBe(digestOf(cluster, DEFAULT_SECRET));
  expect(digestOf(other, secret)).not.toBe(digestOf(cluster, secret));
  expect(digestOf(Buffer.from(cluster), secret)).toBe(digestOf(cluster, secret));
});
