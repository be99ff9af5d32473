// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { SquashfsMessages } from "../../../src/archive/squashfs-messages.ts";

function recorder(): { lines: string[]; log: (level: string, message: string) => void } {
  const lines: string[] = [];
  return { lines, log: (level, message) => void lines.push(`${level} ${message}`) };
}

describe("SquashfsMessages", () => {
  it("counts ACLs instead of repeating them", () => {
    const { lines, log } = recorder();
    const messages = new SquashfsMessages(log);
    for (let index = 0; index < 3; index++) messages.addError("Unrecognised xattr prefix system.posix_acl_access");
    messages.addError("Unrecognised xattr prefix system.posix_acl_default");
    messages.close();
    expect(lines).toEqual(["warn squashfs cannot store ACLs: 4 left out (3 access and 1 default)"]);
    expect(messages.warnings).toBe(1);
  });

  it("keeps what was not read apart, once per file", () => {
    const messages = new SquashfsMessages(() => undefined);
    messages.addError("llistxattr for ./f1 failed in read_attrs, because No such file or directory.  Ignoring");
    messages.addError("Failed to read file ./f1, creating empty file");
    messages.addError("Could not open ./d, skipping...");
    expect([...messages.unread]).toEqual([
      ["./f1", { message: "Failed to read file ./f1, creating empty file", isContent: true }],
      ["./d", { message: "Could not open ./d, skipping...", isContent: true }],
    ]);
    expect(messages.warnings).toBe(0);
  });

  it("puts a message together whose name has line breaks, and keeps names as bytes", () => {
    const messages = new SquashfsMessages(() => undefined);
    for (const line of ["Failed to read file ./a", "", "b\xfc, creating empty file", "Could not open ./d, skipping..."])
      messages.addError(line);
    expect([...messages.unread.keys()]).toEqual(["./a\n\nb\xfc", "./d"]);
    expect(messages.unjudged).toBeUndefined();
  });

  it("takes a path that no restore could create for left out, not for unread", () => {
    const messages = new SquashfsMessages(() => undefined);
    messages.addError(`Cannot stat dir/file ./${"n/".repeat(2047)} because File name too long, ignoring`);
    expect([messages.unread.size, messages.unjudged, messages.warnings]).toEqual([0, undefined, 0]);
    messages.addError("Cannot stat dir/file ./n because File name too long, ignoring"); // no file system has said that
    expect([...messages.unread.keys()]).toEqual(["./n"]);
  });

  it("does not lose a message of which it cannot tell the file", () => {
    const cut = new SquashfsMessages(() => undefined);
    cut.addError("Failed to read file ./a");
    cut.addError("b");
    expect(cut.unjudged).toBe("Failed to read file ./a\nb");
    const endless = new SquashfsMessages(() => undefined);
    endless.addError("Could not open ./a");
    for (let index = 0; index < 100; index++) endless.addError("x".repeat(50));
    expect(endless.unjudged).toMatch(/^Could not open \.\/a\nx/);
    const many = new SquashfsMessages(() => undefined);
    for (let index = 0; index < 1000; index++) many.addError(`Could not open ./${index}, skipping...`);
    expect(many.unjudged).toBeUndefined();
    many.addError("Could not open ./more, skipping...");
    expect(many.unjudged).toMatch(/^more than 1000 files could not be read, among them: Could not open \.\/more/);
  });

  it("takes the totals from the end, whatever a file is called", () => {
    const messages = new SquashfsMessages(() => undefined);
    messages.addInfo("file /a, uncompressed size 5 bytes ");
    messages.addInfo("Number of inodes 999999"); // a name with a newline in it
    messages.addInfo("\t98.18% of uncompressed filesystem size (391778.99 Kbytes)");
    messages.addInfo("Number of inodes 20111");
    messages.addInfo("Number of hard-links 2");
    expect(messages.members).toBe(20113);
    expect(messages.files).toBe(1);
    expect(messages.sourceBytes).toBe(401181686);
  });
});
