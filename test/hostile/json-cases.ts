// SPDX-License-Identifier: AGPL-3.0-or-later
// Sound JSON with something wrong in it: fields missing, twice, of another type, at the edge of their range.
import fc from "fast-check";

interface JsonEdit {
  readonly kind: "replace" | "remove" | "rename" | "repeat" | "wrap" | "copy";
  /** Which field, counted through the whole value and around. */
  readonly at: number;
  readonly value: number;
}

/** Values as they stand in the text: some of them no JSON.stringify() would write. */
const TOKENS = [
  ..."null true false 0 -0 -1 1 1.5 1e2 1e400 99 100 999999999 1000000000 1099511627776 1099511627777".split(" "),
  ..."9007199254740991 9007199254740992 9007199254740993 18446744073709551615 01 +1 NaN [] {} [[]] [null]".split(" "),
  '""',
  '"x"',
  '"0"',
  '"../../etc/passwd"',
  '"a/b"',
  '".."',
  '".hidden"',
  '"a\\u0000b"',
  '"a\\nb"',
  '"a\\u001b[31mb"',
  '"\\ud800"',
  '"ä€😀"',
  '"\u2028"',
  `"${"9".repeat(30)}"`,
  `"${"x".repeat(2000)}"`,
  '"00000000-0000-0000-0000-000000000000"',
  '"FFFFFFFF-ffff-ffff-ffff-ffffffffffff"',
  // Right elsewhere.
  '"full"',
  '"incremental"',
  '"lxc"',
  '"archive.tar"',
  '"drive-scsi0"',
  '"drive-scsi0.qcow2"',
  '"12345678-9abc-4def-8012-3456789abcde"',
  '"qemu-1700000000"',
  '"lxc-0"',
  '{"__proto__":{"uuid":"x"}}',
  '{"constructor":null}',
  `${"[".repeat(600)}${"]".repeat(600)}`,
];

export const jsonEdits: fc.Arbitrary<readonly JsonEdit[]> = fc.oneof(
  { weight: 1, arbitrary: fc.constant([]) },
  {
    weight: 5,
    arbitrary: fc.array(
      fc.record<JsonEdit>({
        kind: fc.constantFrom("replace", "replace", "replace", "remove", "rename", "repeat", "wrap", "copy"),
        at: fc.nat(0xffff),
        value: fc.nat(0xffff),
      }),
      { minLength: 1, maxLength: 2 },
    ),
  },
);

type Holder = Record<string, unknown>;
/** Stands for a token until the text is made. */
const MARK = "@@token";
/** Taken out of names in the end: then the same name is there twice, which no object can hold. */
const TWIN = "@@twin";

/** The text of `sound` after the edits. */
export function editJson(sound: unknown, edits: readonly JsonEdit[]): string {
  const root: Holder = { root: JSON.parse(JSON.stringify(sound)) };
  for (const edit of edits) editOnce(root, edit);
  const text = JSON.stringify(root.root) ?? "";
  return text.replace(/"@@token([0-9]+)"/g, (_, index: string) => TOKENS[Number(index)] as string).replaceAll(TWIN, "");
}

function editOnce(root: Holder, { kind, at, value }: JsonEdit): void {
  const places: Array<readonly [Holder, string]> = [];
  collect(root, places);
  if (places.length === 0) return;
  const [holder, key] = places[at % places.length] as readonly [Holder, string];
  const [otherHolder, otherKey] = places[value % places.length] as readonly [Holder, string];
  const token = `${MARK}${value % TOKENS.length}`;
  const held = holder[key];
  if (kind === "replace") holder[key] = token;
  else if (kind === "wrap") holder[key] = [held];
  else if (kind === "copy") holder[key] = JSON.parse(JSON.stringify(otherHolder[otherKey]));
  else if (Array.isArray(holder)) {
    if (kind === "remove") holder.splice(Number(key), 1);
    else holder.push(kind === "repeat" ? JSON.parse(JSON.stringify(held)) : token);
  } else {
    delete holder[key];
    if (kind === "rename") holder[`${key}x`] = held;
    if (kind === "repeat") {
      holder[key] = token;
      holder[`${key}${TWIN}`] = held;
    }
  }
}

function collect(holder: Holder, places: Array<readonly [Holder, string]>): void {
  for (const key of Object.keys(holder)) {
    places.push([holder, key]);
    const value = holder[key];
    if (typeof value === "object" && value !== null) collect(value as Holder, places);
  }
}
