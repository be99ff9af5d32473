// SPDX-License-Identifier: AGPL-3.0-or-later
// Volume names are parsed by the storage plugin and by the store, which must take the same names and mean the same by
// them. The protocol serves any provider: its schema takes every name that Proxmox VE allows, and no other.
import { execFileSync } from "node:child_process";
import path from "node:path";
import fc from "fast-check";
import { describe, it } from "vitest";
import * as validators from "../../../bridge/generated/validators.mjs";
import { parseArchiveName } from "../../../src/pve/archive-name.ts";
import { CASES, CASES_TIMEOUT_MS, expectHostError, must, Tally, thrownBy } from "../cases.ts";

const root = path.resolve(import.meta.dirname, "../../..");

const digits = fc
  .integer({ min: 1, max: 14 })
  .chain((length) =>
    fc.array(fc.integer({ min: 0, max: 9 }), { minLength: length, maxLength: length }).map((list) => list.join("")),
  );
const number = fc.oneof(
  fc.integer({ min: 100, max: 999_999_999 }).map(String),
  fc.integer({ min: 100, max: 999_999_999 }).map(String),
  digits,
  fc.constantFrom(
    "0",
    "00",
    "01",
    "99",
    "099",
    "0100",
    "1e3",
    "+100",
    "-100",
    "0x64",
    " 100",
    "100.0",
    "",
    "１００",
    "1700000000",
  ),
);
const oneIn = (many: number, good: string, ...bad: string[]): fc.Arbitrary<string> =>
  fc.oneof({ weight: many, arbitrary: fc.constant(good) }, { weight: 1, arbitrary: fc.constantFrom(...bad) });
const name = fc
  .tuple(
    oneIn(
      9,
      "backup/",
      "",
      "/backup/",
      "Backup/",
      "backup//",
      "backup/../backup/",
      "backup\\",
      "backup",
      "./backup/",
      "bk:backup/",
    ),
    number,
    oneIn(9, "/", "", "//", "\\", "/../100/", "/./"),
    fc.constantFrom(
      "qemu",
      "lxc",
      "qemu",
      "lxc",
      "qemu",
      "lxc",
      "qemu",
      "lxc",
      "QEMU",
      "vm",
      "",
      "qemu-",
      "..",
      "qemu\n",
    ),
    oneIn(9, "-", "", "--", "_", "\u2010"),
    number,
    oneIn(12, "", "\n", "\r", "\0", " ", "/", "/..", "/manifest.json", ".qcow2", "\u0660", "x".repeat(5000)),
  )
  .map((parts) => parts.join(""));
/** A character more, less, or another one. */
const edit = fc.option(
  fc.tuple(fc.nat(40), fc.constantFrom("", "0", "9", "/", "-", ".", "\n", "\0", "q", "ä"), fc.nat(1)),
  {
    freq: 2,
    nil: undefined,
  },
);

/** Read character by character: "backup/<vmid>/<type>-<epoch>", or undefined. */
function partsByHand(volname: string): { vmid: string; type: string; epoch: string } | undefined {
  const [first, vmid = "", last = "", ...more] = volname.split("/");
  const [type = "", epoch = "", ...further] = last.split("-");
  const isNumber = (text: string, longest: number): boolean =>
    text.length > 0 && text.length <= longest && [...text].every((char) => char >= "0" && char <= "9");
  const isSound =
    first === "backup" &&
    more.length + further.length === 0 &&
    isNumber(vmid, 9) &&
    vmid.length >= 3 &&
    !vmid.startsWith("0") &&
    (type === "qemu" || type === "lxc") &&
    isNumber(epoch, 12) &&
    (epoch === "0" || !epoch.startsWith("0"));
  return isSound ? { vmid, type, epoch } : undefined;
}

/** Proxmox VE's own rule for an archive name, character by character; no part of it leads anywhere else. */
function isPveName(archive: string): boolean {
  const isAllowed = (char: string): boolean => /^[A-Za-z0-9]$/.test(char) || ".+=_/:-".includes(char);
  const parts = archive.split("/");
  return (
    archive.length <= 248 && [...archive].every(isAllowed) && !parts.some((part) => ["", ".", ".."].includes(part))
  );
}

describe("volume names", () => {
  it(
    "are taken and split by the plugin, the schema and the store alike",
    () => {
      const names: string[] = [];
      const tally = new Tally();
      fc.assert(
        fc.property(name, edit, (sound, change) => {
          const [at, text, removed] = change ?? [0, "", 0];
          const volname = sound.slice(0, at) + text + sound.slice(at + removed);
          names.push(volname);
          const wanted = partsByHand(volname);
          let isTaken = true;
          try {
            const { archive, vmid, type, epoch } = parseArchiveName(volname);
            const isBare = partsByHand(`backup/${volname}`) !== undefined;
            must(wanted !== undefined || isBare, `the store takes ${JSON.stringify(volname)}`);
            must(
              archive === volname.replace(/^backup\//, "") && archive === `${vmid}/${type}-${epoch}`,
              "nothing is lost",
            );
            isTaken = !isBare;
          } catch (error) {
            isTaken = false;
            must(expectHostError(error).message.length < 300, "a short message");
          }
          must(isTaken === (wanted !== undefined), `the store: ${JSON.stringify(volname)}`);
          const isValid = validators.restore_get_mechanism_params({ volname });
          const isAllowed = volname.startsWith("backup/") && isPveName(volname.slice("backup/".length));
          must(isValid === isAllowed, `the schema: ${JSON.stringify(volname)}`);
          must(isValid || wanted === undefined, `the schema refuses a name of ours: ${JSON.stringify(volname)}`);
          const bare = validators.backup_init_result({ "archive-name": volname });
          must(bare === isPveName(volname), `an archive name: ${JSON.stringify(volname)}`);
          tally.add(wanted === undefined ? "refused" : wanted.type);
        }),
        { seed: 51, numRuns: CASES },
      );
      tally.expectAtLeast({ qemu: 4000, lxc: 4000, refused: 20_000 });
      const lines = names.map((one) => `${Buffer.from(one).toString("hex")}\n`).join("");
      const args = ["-T", "-I", "perl-shim", "-I", "fixtures/pve/lib", "test/hostile/store/parse-volnames.pl"];
      const options = { cwd: root, input: lines, encoding: "utf8", maxBuffer: 2 ** 28 } as const;
      const answers = execFileSync("perl", args, options).split("\n");
      must(answers.length === names.length + 1, "one answer each");
      for (const [index, volname] of names.entries()) {
        const parts = partsByHand(volname);
        const { vmid, type, epoch } = parts ?? { vmid: "", type: "", epoch: "" };
        const wanted = parts === undefined ? "-" : `backup ${vmid}/${type}-${epoch} ${vmid}    directory`;
        must(answers[index] === wanted, `the plugin: ${JSON.stringify(volname)} is ${answers[index]}`);
      }
    },
    CASES_TIMEOUT_MS,
  );

  it("that are no text at all are refused in one line", () => {
    for (const text of ["", "\ud800", "\0", "a\nb\u001b[31m"]) expectHostError(thrownBy(() => parseArchiveName(text)));
  });
});
