// SPDX-License-Identifier: AGPL-3.0-or-later
// docs/storage-cfg.md against the options of the storage plugin.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";

const root = new URL("../../../", import.meta.url);
const page = readFileSync(new URL("docs/storage-cfg.md", root), "utf8");
const program = `
  use PVE::Storage; use JSON;
  my $plugin = 'PVE::Storage::Custom::BackupProviderDirExamplePlugin';
  print JSON->new->encode({ options => $plugin->options(), properties => $plugin->properties() });
`;
const plugin = JSON.parse(
  execFileSync("perl", ["-T", "-Iperl-shim", "-Ifixtures/pve/lib", "-e", program], { cwd: root, encoding: "utf8" }),
) as {
  options: Record<string, { fixed?: number; optional?: number }>;
  properties: Record<
    string,
    { type: string; description: string; enum?: string[]; minimum?: number; maximum?: number; default: string | number }
  >;
};

describe("docs/storage-cfg.md", () => {
  it("has a section and a row for each option, and no others", () => {
    const rows = [...page.matchAll(/^\| \[`([^`]+)`\]/gm)].map(([, name]) => name);
    const sections = [...page.matchAll(/^### (.+)$/gm)].map(([, name]) => name);
    expect(rows.sort()).toEqual(Object.keys(plugin.options).sort());
    expect(sections.sort()).toEqual(Object.keys(plugin.options).sort());
  });

  it.each(Object.entries(plugin.properties))("names values and default of %s", (name, property) => {
    const { enum: words, minimum, maximum, type, description } = property;
    const chosen = type === "boolean" ? ["0", "1"] : words;
    const unit = description.includes("days") ? "days" : "seconds";
    const values = chosen?.map((value) => `\`${value}\``).join(", ") ?? `${unit}, \`${minimum}\` to \`${maximum}\``;
    expect(page).toContain(`| [\`${name}\`](#${name}) | ${values} | \`${property.default}\` |`);
  });

  it("describes the one option that cannot be changed", () => {
    const fixed = Object.keys(plugin.options).filter((name) => plugin.options[name]?.fixed === 1);
    expect(fixed).toEqual(["path"]);
    expect(page.split("### path")[1]?.split("###")[0]).toContain("cannot be changed");
  });
});
