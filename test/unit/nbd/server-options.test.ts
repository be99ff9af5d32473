// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it } from "vitest";
import { type ChosenExport, serveHandshake } from "../../../src/nbd/server-options.ts";
import { type Fed, feed } from "../../support/nbd/feed-receiver.ts";
import { MemoryExport } from "../../support/nbd/memory-export.ts";
import {
  bytes,
  clientFlags,
  contextOption,
  contextReply,
  goOption,
  greeting,
  OPT_ABORT,
  OPT_EXPORT_NAME,
  OPT_GO,
  OPT_INFO,
  OPT_LIST,
  OPT_LIST_META_CONTEXT,
  OPT_SET_META_CONTEXT,
  OPT_STARTTLS,
  OPT_STRUCTURED_REPLY,
  option,
  optionReply,
  REP_ACK,
  REP_ERR_INVALID,
  REP_ERR_UNKNOWN,
  REP_ERR_UNSUP,
  REP_INFO,
  REP_SERVER,
  text,
  u16,
  u32,
  u64,
} from "../../support/nbd/nbd-bytes.ts";

const scsi0 = new MemoryExport({ name: "drive-scsi0", description: "10:00", bytes: Buffer.alloc(1536) });
const scsi1 = new MemoryExport({ name: "drive-scsi1", description: "", bytes: Buffer.alloc(512) });
const EXPORTS = new Map([scsi0, scsi1].map((one) => [one.name, one]));
/** HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN. */
const FLAGS = 0x0103;
const WITH_DF = FLAGS | 0x80;

interface Conversation extends Fed<ChosenExport | undefined> {
  readonly sent: Buffer;
}

/** What the server says to these bytes after its greeting. */
function converse(...parts: Buffer[]): Conversation {
  const sent: Buffer[] = [];
  const fed = feed(
    serveHandshake((part) => sent.push(part), EXPORTS),
    Buffer.concat(parts),
  );
  expect(fed.thrown).toBeUndefined();
  const all = Buffer.concat(sent);
  expect(all.subarray(0, 18)).toEqual(greeting(3));
  return { ...fed, sent: all.subarray(18) };
}

/** An error reply, without its text. */
const errorOf = (sent: Buffer): Buffer => sent.subarray(0, 16);
const error = (number: number, type: number): Buffer => bytes("0003e889045565a9", u32(number), u32(type));
const info = (number: number, type: number, body: string): Buffer => optionReply(number, REP_INFO, u16(type) + body);
const structured = option(OPT_STRUCTURED_REPLY);
const structuredAck = optionReply(OPT_STRUCTURED_REPLY, REP_ACK);

describe("serveHandshake()", () => {
  it("opens an export by NBD_OPT_GO and tells nothing that was not asked for", () => {
    const { sent, result } = converse(clientFlags(), goOption(OPT_GO, "drive-scsi0"));
    expect(sent).toEqual(Buffer.concat([info(OPT_GO, 0, u64(1536) + u16(FLAGS)), optionReply(OPT_GO, REP_ACK)]));
    expect(result).toEqual({ export: scsi0, hasStructuredReplies: false, hasAllocation: false });
  });

  it("answers NBD_OPT_INFO with what was asked for, and goes on", () => {
    const { sent, isHungry } = converse(clientFlags(), structured, goOption(OPT_INFO, "drive-scsi0", 1, 2, 3, 99));
    expect(sent).toEqual(
      Buffer.concat([
        structuredAck,
        info(OPT_INFO, 0, u64(1536) + u16(WITH_DF)),
        info(OPT_INFO, 1, text("drive-scsi0")),
        info(OPT_INFO, 2, text("10:00")),
        info(OPT_INFO, 3, u32(1) + u32(65536) + u32(33554432)), // minimum, preferred, maximum
        optionReply(OPT_INFO, REP_ACK),
      ]),
    );
    expect(isHungry).toBe(true);
  });

  it("lists the exports with their descriptions", () => {
    const { sent } = converse(clientFlags(), option(OPT_LIST));
    expect(sent).toEqual(
      Buffer.concat([
        optionReply(OPT_LIST, REP_SERVER, u32(11) + text("drive-scsi010:00")),
        optionReply(OPT_LIST, REP_SERVER, u32(11) + text("drive-scsi1")),
        optionReply(OPT_LIST, REP_ACK),
      ]),
    );
  });

  it("opens an export by NBD_OPT_EXPORT_NAME, with 124 zeroes unless they were left out", () => {
    const opened = option(OPT_EXPORT_NAME, text("drive-scsi1"));
    const answer = bytes(u64(512), u16(FLAGS));
    expect(converse(clientFlags(1), opened).sent).toEqual(Buffer.concat([answer, Buffer.alloc(124)]));
    const { sent, result } = converse(clientFlags(3), opened);
    expect(sent).toEqual(answer);
    expect(result?.export).toBe(scsi1);
  });

  it("ends without a word if NBD_OPT_EXPORT_NAME names no export", () => {
    const { sent, result, isHungry } = converse(clientFlags(), option(OPT_EXPORT_NAME, text("drive-scsi9")));
    expect({ sent: sent.length, result, isHungry }).toEqual({ sent: 0, result: undefined, isHungry: false });
  });

  it("acknowledges NBD_OPT_ABORT and ends", () => {
    const { sent, result, isHungry } = converse(clientFlags(), option(OPT_ABORT));
    expect(sent).toEqual(optionReply(OPT_ABORT, REP_ACK));
    expect({ result, isHungry }).toEqual({ result: undefined, isHungry: false });
  });

  it.each([
    ["an option that it does not know", option(77, "0102"), 77, REP_ERR_UNSUP],
    ["TLS", option(OPT_STARTTLS), OPT_STARTTLS, REP_ERR_UNSUP],
    ["extended headers", option(11), 11, REP_ERR_UNSUP],
    ["data with NBD_OPT_LIST", option(OPT_LIST, "00"), OPT_LIST, REP_ERR_INVALID],
    ["data with NBD_OPT_STRUCTURED_REPLY", option(8, "00"), 8, REP_ERR_INVALID],
    ["an unknown export", goOption(OPT_GO, "drive-scsi9"), OPT_GO, REP_ERR_UNKNOWN],
    ["NBD_OPT_GO without data", option(OPT_GO), OPT_GO, REP_ERR_INVALID],
    ["a name longer than its option", option(OPT_GO, `${u32(12)}${text("drive-scsi")}0000`), OPT_GO, REP_ERR_INVALID],
    ["a name of 4097 bytes", goOption(OPT_GO, "x".repeat(4097)), OPT_GO, REP_ERR_INVALID],
    ["bytes behind the information types", option(OPT_GO, `${u32(0)}${u16(0)}00`), OPT_GO, REP_ERR_INVALID],
    ["too few information types", option(OPT_GO, `${u32(0)}${u16(2)}${u16(3)}`), OPT_GO, REP_ERR_INVALID],
    ["contexts without structured replies", contextOption(10, "drive-scsi0"), 10, REP_ERR_INVALID],
  ])("refuses %s, and goes on", (_what, sentOption, number, type) => {
    const { sent, isHungry } = converse(clientFlags(), sentOption);
    expect(errorOf(sent)).toEqual(error(number, type));
    expect(sent.length).toBe(20 + sent.readUInt32BE(16));
    expect(isHungry).toBe(true);
  });

  it.each([
    ["an export that does not exist", contextOption(OPT_SET_META_CONTEXT, "drive-scsi9"), REP_ERR_UNKNOWN],
    ["more queries than there are", option(10, `${u32(0)}${u32(0xffffffff)}`), REP_ERR_INVALID],
    ["bytes behind the queries", option(10, `${u32(0)}${u32(0)}00`), REP_ERR_INVALID],
  ])("refuses contexts of %s", (_what, sentOption, type) => {
    const { sent } = converse(clientFlags(), structured, sentOption);
    expect(errorOf(sent.subarray(20))).toEqual(error(OPT_SET_META_CONTEXT, type));
  });

  it("sets base:allocation, once, and no other context", () => {
    const { sent, result } = converse(
      ...[clientFlags(), structured],
      contextOption(OPT_SET_META_CONTEXT, "drive-scsi0", "qemu:dirty-bitmap:x", "base:allocation", "base:allocation"),
      goOption(OPT_GO, "drive-scsi0"),
    );
    expect(sent.subarray(20, 20 + 24 + 15 + 20)).toEqual(
      Buffer.concat([
        contextReply(OPT_SET_META_CONTEXT, 1, "base:allocation"),
        optionReply(OPT_SET_META_CONTEXT, REP_ACK),
      ]),
    );
    expect(result).toEqual({ export: scsi0, hasStructuredReplies: true, hasAllocation: true });
  });

  it.each([
    ["the whole namespace", contextOption(10, "drive-scsi0", "base:")],
    ["nothing", contextOption(10, "drive-scsi0")],
    ["the beginning of a name", contextOption(10, "drive-scsi0", "base:alloc")],
  ])("sets no context for a query of %s", (_what, query) => {
    const { sent, result } = converse(clientFlags(), structured, query, goOption(OPT_GO, "drive-scsi0"));
    expect(sent.subarray(20, 40)).toEqual(optionReply(OPT_SET_META_CONTEXT, REP_ACK));
    expect(result?.hasAllocation).toBe(false);
  });

  it.each([
    ["everything", contextOption(OPT_LIST_META_CONTEXT, "drive-scsi0"), true],
    ["the namespace", contextOption(OPT_LIST_META_CONTEXT, "drive-scsi0", "base:"), true],
    ["its name", contextOption(OPT_LIST_META_CONTEXT, "drive-scsi0", "base:allocation"), true],
    ["another namespace", contextOption(OPT_LIST_META_CONTEXT, "drive-scsi0", "qemu:"), false],
  ])("lists contexts for a query of %s", (_what, query, isFound) => {
    const { sent, result } = converse(clientFlags(), structured, query, goOption(OPT_GO, "drive-scsi0"));
    const found = isFound ? [contextReply(OPT_LIST_META_CONTEXT, 0, "base:allocation")] : [];
    const expected = Buffer.concat([...found, optionReply(OPT_LIST_META_CONTEXT, REP_ACK)]);
    expect(sent.subarray(20, 20 + expected.length)).toEqual(expected);
    expect(result?.hasAllocation).toBe(false);
  });

  it("drops the context if another export is opened, or the last request for contexts failed", () => {
    const set = contextOption(OPT_SET_META_CONTEXT, "drive-scsi0", "base:allocation");
    const failing = contextOption(OPT_SET_META_CONTEXT, "drive-scsi9", "base:allocation");
    const other = converse(clientFlags(), structured, set, goOption(OPT_GO, "drive-scsi1"));
    expect(other.result).toEqual({ export: scsi1, hasStructuredReplies: true, hasAllocation: false });
    const failed = converse(clientFlags(), structured, set, failing, goOption(OPT_GO, "drive-scsi0"));
    expect(failed.result?.hasAllocation).toBe(false);
  });

  it.each([
    ["client flags without fixed newstyle", [clientFlags(2)]],
    ["client flags that do not exist", [clientFlags(7)]],
    ["a wrong option magic", [clientFlags(), bytes("49484156454f5055", u32(OPT_LIST), u32(0))]],
    ["an option of 32769 bytes", [clientFlags(), bytes("49484156454f5054", u32(OPT_GO), u32(32769))]],
  ])("ends without a word at %s", (_what, parts) => {
    const { sent, result, isHungry, largestBytes } = converse(...parts);
    expect({ sent: sent.length, result, isHungry }).toEqual({ sent: 0, result: undefined, isHungry: false });
    expect(largestBytes).toBeLessThan(100);
  });
});
