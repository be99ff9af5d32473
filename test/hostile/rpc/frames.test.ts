// SPDX-License-Identifier: AGPL-3.0-or-later
// Generated peers of the bridge: sound requests with something wrong in their framing, their JSON or their
// params. What is a message is judged by a second reading of the bytes, written from the protocol alone.
import { PassThrough, Writable } from "node:stream";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { createMessageConnection, ResponseError, StreamMessageWriter } from "vscode-jsonrpc/node.js";
import { Dispatcher, PROTOCOL_VERSION } from "../../../bridge/dispatcher.ts";
import { ProtocolError, RPC_ERROR_NUMBERS, toRpcError } from "../../../bridge/error-map.ts";
import { FrameReader } from "../../../bridge/frame-reader.ts";
import { FrameParser } from "../../../bridge/framing.ts";
import { UnsupportedError } from "../../../src/core/index.ts";
import type { Provider } from "../../../src/provider/index.ts";
import { createFakeProvider } from "../../support/bridge/fake-provider.ts";
import { byteEdits, CASES, CASES_TIMEOUT_MS, editBytes, expectOneLine, must, Tally } from "../cases.ts";
import { editJson, jsonEdits } from "../json-cases.ts";

const volname = "backup/100/qemu-1700000000";
const vm = { vmid: 100, vmtype: "qemu" };
const info = { "bandwidth-limit": 1000, "firewall-config": "W09QVElPTlNd" };
const container = { ...info, directory: "/run/x", sources: ["./", "./mnt/data"], "backup-user-id": 100000 };
const sizes = { "drive-scsi0": { size: 4194304 }, "drive-efidisk0": { size: 540672 } };
const volumes = {
  "drive-scsi0": {
    size: 4194304,
    "bitmap-mode": "reuse",
    "bitmap-name": "snapshot-access:bk",
    "nbd-path": "nbd:unix:/run/x:exportname=drive-scsi0",
  },
};
/** Sound params of every request that a shim sends. */
const REQUESTS: ReadonlyArray<readonly [string, object]> = [
  ["job_init", { "start-time": 1700000000 }],
  ["job_cleanup", {}],
  ["backup_init", { ...vm, "start-time": 1700000000 }],
  ["backup_cleanup", { ...vm, success: false, error: "it failed" }],
  ["backup_get_mechanism", vm],
  ["backup_handle_log_file", { vmid: 100, filename: "/var/log/vzdump/qemu-100.log" }],
  ["backup_vm_query_incremental", { vmid: 100, volumes: sizes }],
  ["backup_vm_available_bitmaps", { vmid: 100, volumes: sizes }],
  ["backup_vm", { vmid: 100, "guest-config": "bmFtZTogeAo=", volumes, info }],
  ["backup_container_prepare", { vmid: 101, info: container }],
  [
    "backup_container",
    {
      vmid: 101,
      "guest-config": "",
      "exclude-patterns": ["/tmp/?*"],
      info: container,
      handles: [9, 10],
    },
  ],
  ["restore_get_mechanism", { volname }],
  ["archive_get_guest_config", { volname }],
  ["archive_get_firewall_config", { volname }],
  ["restore_vm_init", { volname }],
  ["restore_vm_cleanup", { volname }],
  ["restore_vm_volume_init", { volname, "device-name": "drive-scsi0" }],
  ["restore_vm_volume_cleanup", { volname, "device-name": "drive-scsi0" }],
  ["restore_container_init", { volname: "backup/101/lxc-1700000000" }],
  ["list_volumes", { vmid: 100 }],
  ["volume_size_info", { volname }],
  ["get_volume_attribute", { volname, attribute: "notes" }],
  ["update_volume_attribute", { volname, attribute: "notes", value: "x" }],
  ["free_volume", { volname }],
  [
    "prune_backups",
    { keep: { "keep-all": 0, "keep-last": 3, "keep-weekly": 2 }, vmid: 100, type: "qemu", dryrun: true },
  ],
  ["shutdown", {}],
  ["run_a_command", { command: "rm -rf /" }],
  ["__proto__", {}],
  ["$/cancelRequest", { id: 1 }],
];
const INITIALIZE = {
  "protocol-version": PROTOCOL_VERSION,
  storeid: "bk",
  type: "backup-provider-dir-example",
  scfg: { path: "/x" },
  nodename: "node1",
};

const request = fc
  .tuple(
    fc.nat(REQUESTS.length - 1),
    fc.integer({ min: 1, max: 4 }),
    jsonEdits,
    fc.constantFrom(true, false, false, false),
  )
  .map(([index, id, edits, isWhole]) => {
    const [method, params] = REQUESTS[index] as readonly [string, object];
    const message = { jsonrpc: "2.0", ...(method.startsWith("$") ? {} : { id }), method, params };
    if (isWhole) return editJson(message, edits);
    return JSON.stringify({ ...message, params: 0 }).replace(
      '"params":0',
      `"params":${editJson(params, edits) || "[]"}`,
    );
  });
const odd = fc.constantFrom(
  "",
  "null",
  "[]",
  "{",
  '[{"jsonrpc":"2.0","id":1,"method":"job_cleanup","params":{}}]',
  '{"jsonrpc":"2.0","id":7,"result":1}',
  '{"jsonrpc":"2.0","id":7,"error":{"code":1,"message":"a\\nb"}}',
  '{"jsonrpc":"2.0","id":7,"error":true}',
  '{"jsonrpc":"2.0","id":null,"error":{}}',
  '{"jsonrpc":"2.0","method":"$/cancelRequest"}',
  '{"jsonrpc":"2.0","method":"$/cancelRequest","params":null}',
  '{"jsonrpc":"2.0","method":"unknown","params":[1]}',
  '{"jsonrpc":"1.0","id":1,"method":"job_cleanup"}',
  `${"[".repeat(100_000)}`,
  `{"jsonrpc":"2.0","id":1,"method":"job_init","params":${'{"a":'.repeat(511)}1${"}".repeat(511)}}`,
  `{"jsonrpc":"2.0","id":1,"method":"job_init","params":${'{"a":'.repeat(512)}1${"}".repeat(512)}}`,
);
const body = fc.oneof({ weight: 12, arbitrary: request }, { weight: 1, arbitrary: odd });
/** The header for a body of so many bytes. */
const header = fc.oneof(
  { weight: 12, arbitrary: fc.constant((bytes: number) => `Content-Length: ${bytes}\r\n\r\n`) },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      (bytes: number) => `content-length:\t${bytes} \r\nContent-Type: x\r\n\r\n`,
      (bytes: number) => `Content-Length: 1\r\nContent-Length: ${bytes}\r\n\r\n`,
      (bytes: number) => `Content-Length: ${bytes + 1}\r\n\r\n`,
      (bytes: number) => `Content-Length: ${Math.max(0, bytes - 1)}\r\n\r\n`,
      () => "Content-Length: 0\r\n\r\n",
      () => "Content-Length: -1\r\n\r\n",
      () => "Content-Length: 1099511627776\r\n\r\n",
      () => "Content-Length: 18446744073709551616\r\n\r\n",
      () => "Content-Length: 67108865\r\n\r\n",
      (bytes: number) => `Content-Length: 0x${bytes.toString(16)}\r\n\r\n`,
      (bytes: number) => `Content-Length: ${bytes}x\r\n\r\n`,
      (bytes: number) => `Content-Length: ${bytes}\n\n`,
      () => "Content-Type: x\r\n\r\n",
      () => "\r\n\r\n",
      (bytes: number) => `X: ${"y".repeat(5000)}\r\nContent-Length: ${bytes}\r\n\r\n`,
    ),
  },
);
const frames = fc
  .array(fc.tuple(header, body), { minLength: 1, maxLength: 3 })
  .map((list) =>
    Buffer.concat(
      list.map(([head, text]) => Buffer.concat([Buffer.from(head(Buffer.byteLength(text))), Buffer.from(text)])),
    ),
  );
/** Framing is broken in some cases only: the others are to get through. */
const edits = fc.oneof({ weight: 2, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: byteEdits });

interface Reading {
  readonly messages: ReadonlyArray<Record<string, unknown>>;
  readonly isBroken: boolean;
}

/** What these bytes say, read at leisure. */
function readByHand(input: Buffer): Reading {
  const messages: Array<Record<string, unknown>> = [];
  let rest = input;
  for (;;) {
    const text = rest.toString("latin1");
    const split = text.indexOf("\r\n\r\n");
    if (split < 0) return { messages, isBroken: rest.length > 4096 };
    if (split > 4096) return { messages, isBroken: true };
    const lengths = text
      .slice(0, split)
      .split("\r\n")
      .flatMap((line) => /^content-length:[\t ]*(\d{1,12})[\t ]*$/i.exec(line)?.slice(1) ?? []);
    const bytes = Number(lengths.at(-1) ?? Number.POSITIVE_INFINITY);
    if (bytes > 2 ** 26) return { messages, isBroken: true };
    if (rest.length < split + 4 + bytes) return { messages, isBroken: false };
    const message = messageByHand(rest.subarray(split + 4, split + 4 + bytes));
    if (message === undefined) return { messages, isBroken: true };
    messages.push(message);
    rest = rest.subarray(split + 4 + bytes);
  }
}

function messageByHand(bytes: Buffer): Record<string, unknown> | undefined {
  let value: unknown;
  try {
    const text = bytes.toString("utf8");
    if (!Buffer.from(text).equals(bytes)) return undefined; // no UTF-8
    if (depthOf(text) > 512) return undefined;
    value = JSON.parse(text);
  } catch {
    return undefined;
  }
  if (!isPlain(value) || value.jsonrpc !== "2.0") return undefined;
  const kinds = [value.id === null ? "null" : typeof value.id, typeof value.method].join();
  const hasParams = value.params === undefined || (typeof value.params === "object" && value.params !== null);
  if (kinds === "string,string" || kinds === "number,string" || kinds === "undefined,string") {
    const cancelled = value.method === "$/cancelRequest" ? (value.params as { id?: unknown } | undefined)?.id : 0;
    return hasParams && ["string", "number"].includes(typeof cancelled) ? value : undefined;
  }
  if (!["string,undefined", "number,undefined", "null,undefined"].includes(kinds)) return undefined;
  return value.result !== undefined || isPlain(value.error) ? value : undefined;
}

const isPlain = (value: unknown): value is Record<string, unknown> =>
  Object.prototype.toString.call(value) === "[object Object]";
/** Of the text, not of the value: a field that comes twice leaves only one of its values behind. */
function depthOf(text: string): number {
  let depth = 0;
  let deepest = 0;
  for (const bracket of text.replace(/"(?:[^"\\]|\\.)*"/g, "").match(/[[\]{}]/g) ?? []) {
    depth += /[[{]/.test(bracket) ? 1 : -1;
    deepest = Math.max(deepest, depth);
  }
  return deepest;
}

describe("FrameParser", () => {
  it(
    "finds the messages that a second reading finds, however the bytes come, and refuses the rest in one line",
    () => {
      const tally = new Tally();
      fc.assert(
        fc.property(frames, edits, fc.integer({ min: 1, max: 300 }), (sound, list, step) => {
          const input = editBytes(sound, list);
          const parser = new FrameParser();
          const messages: unknown[] = [];
          let problem: unknown;
          try {
            for (let at = 0; at < input.length; at += step) {
              for (const message of parser.feed(input.subarray(at, at + step))) messages.push(message);
            }
          } catch (error) {
            problem = error;
          }
          const wanted = readByHand(input);
          must((problem !== undefined) === wanted.isBroken, `broken: ${wanted.isBroken}, thrown: ${String(problem)}`);
          must(JSON.stringify(messages) === JSON.stringify(wanted.messages), "the same messages");
          must(parser.heldBytes <= input.length, "nothing is held but what came");
          if (problem !== undefined) {
            must(problem instanceof ProtocolError, "an error of the protocol");
            expectOneLine((problem as ProtocolError).message);
          }
          tally.add(`${messages.length} messages`);
          tally.add(problem === undefined ? "intact" : (problem as Error).message.replace(/\d+/g, "#"));
        }),
        { seed: 41, numRuns: CASES },
      );
      tally.expectAtLeast({
        "1 messages": 20_000,
        "3 messages": 3000,
        intact: 30_000,
        "there is no header in # bytes": 100,
        "a header has no Content-Length": 1000,
        "a message of # bytes is too long": 500,
        "a message is not valid JSON": 5000,
        "a message is not JSON-RPC #.#": 5000,
      });
    },
    CASES_TIMEOUT_MS,
  );

  it("allocates nothing for a message that is only announced", () => {
    const before = process.memoryUsage().arrayBuffers;
    const parsers = Array.from({ length: 100 }, () => {
      const parser = new FrameParser();
      expect([...parser.feed(Buffer.from("Content-Length: 67108864\r\n\r\n{"))]).toEqual([]);
      return parser;
    });
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(2 ** 20);
    expect(parsers.map((parser) => parser.heldBytes)).toEqual(parsers.map(() => 1));
  });
});

/** Fails if a provider is handed what the protocol does not allow; leaves out what would touch this machine. */
function guarded(provider: Provider): Provider {
  const { backup, restore, storage } = provider;
  return {
    backup: guardedRole(backup),
    restore: guardedRole(restore),
    storage: guardedRole(storage),
    [Symbol.asyncDispose]: () => provider[Symbol.asyncDispose](),
  };
}

function guardedRole<Role extends object>(role: Role): Role {
  return new Proxy(role, {
    get(target, name) {
      const held: unknown = Reflect.get(target, name);
      if (typeof held !== "function") return held;
      return async (...values: unknown[]): Promise<unknown> => {
        for (const value of values) {
          if (typeof value === "number" && name !== "updateVolumeAttribute")
            must(Number.isSafeInteger(value) && value >= 0, `${String(name)}: ${value}`);
          if (typeof value === "string")
            must(!value.includes("\0") || /^(updateVolumeAttribute|backupCleanup)$/.test(String(name)), "no NUL");
          if (typeof value === "string" && value.startsWith("backup/"))
            must(!value.split("/").some((part) => part === "" || part === "." || part === ".."), "no way out");
          if (value instanceof Map) for (const device of value.keys()) must(/^[\w.-]{1,64}$/.test(device), "a device");
        }
        if (/^backupContainer/.test(String(name))) throw new UnsupportedError("Cannot back up containers: not here");
        return await (held as (...list: unknown[]) => unknown).apply(target, values);
      };
    },
  });
}

interface Answer {
  readonly id: unknown;
  readonly result?: unknown;
  readonly error?: { readonly code: number; readonly message: string };
}

/** Connects as run-bridge.ts does, sends `input`, and waits until `wanted` answers or an error came. */
async function converse(input: Buffer, wanted: number): Promise<{ answers: Answer[]; errors: unknown[] }> {
  const answers: Answer[] = [];
  const errors: unknown[] = [];
  const output = new Writable({
    write(bytes: Buffer, _encoding, done) {
      for (const line of bytes.toString().split("Content-Length: ")) {
        const [, text] = line.split("\r\n\r\n");
        if (text !== undefined && text !== "") answers.push(JSON.parse(text) as Answer);
        else if (line.startsWith("{")) answers.push(JSON.parse(line) as Answer);
      }
      done();
    },
  });
  const stream = new PassThrough();
  const connection = createMessageConnection(new FrameReader(stream), new StreamMessageWriter(output));
  connection.onError(([error]) => errors.push(error));
  const dispatcher = new Dispatcher({
    providers: { "backup-provider-dir-example": async (context) => guarded(await createFakeProvider(context)) },
    log: () => undefined,
    fileHandles: { nextDirtyRegions: async () => ({ regions: [], done: true }), deallocate: async () => undefined },
  });
  await dispatcher.dispatch("initialize", INITIALIZE, new AbortController().signal);
  connection.onRequest(async (method: string, params: unknown) => {
    try {
      return await dispatcher.dispatch(method, params, new AbortController().signal);
    } catch (error) {
      const { code, message, data } = toRpcError(error);
      return new ResponseError(code, message, data);
    }
  });
  connection.listen();
  stream.write(input);
  for (let turn = 0; turn < 2000 && answers.length < wanted; turn++) await new Promise(setImmediate);
  await new Promise(setImmediate);
  connection.dispose();
  await dispatcher.end("the test is over");
  return { answers, errors };
}

const KNOWN = new Set<number>(Object.values(RPC_ERROR_NUMBERS));

describe("Dispatcher", () => {
  it(
    "answers every request once, with a result or one line that is no internal error, and ends at what is none",
    async () => {
      const tally = new Tally();
      await fc.assert(
        fc.asyncProperty(frames, edits, async (sound, list) => {
          const input = editBytes(sound, list);
          const { messages, isBroken } = readByHand(input);
          const ids = new Set(
            messages.filter((one) => one.method !== undefined && one.id !== undefined).map(({ id }) => id),
          );
          const { answers, errors } = await converse(input, ids.size);
          must(errors.length === Number(isBroken), `${errors.length} errors, broken: ${isBroken}`);
          must(
            new Set(answers.map(({ id }) => id)).size === ids.size,
            `${answers.length} answers to ${ids.size} requests`,
          );
          for (const { error } of answers) {
            if (error === undefined) {
              tally.add("result");
              continue;
            }
            must(KNOWN.has(error.code) && error.code !== RPC_ERROR_NUMBERS.INTERNAL, `${error.code}: ${error.message}`);
            expectOneLine(error.message);
            tally.add(String(error.code));
          }
          if (isBroken) tally.add("broken");
        }),
        { seed: 42, numRuns: CASES / 5 },
      );
      tally.expectAtLeast({
        result: 3000,
        broken: 3000,
        [RPC_ERROR_NUMBERS.INVALID_PARAMS]: 3000,
        [RPC_ERROR_NUMBERS.METHOD_NOT_FOUND]: 500,
        [RPC_ERROR_NUMBERS.CANCELLED]: 10,
        [RPC_ERROR_NUMBERS.NOT_SUPPORTED]: 100,
      });
    },
    CASES_TIMEOUT_MS,
  );
});
