// SPDX-License-Identifier: AGPL-3.0-or-later
// The bridge as a process, around the test double: framing, order, cancellation, and how it ends.
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { PROTOCOL_VERSION } from "../../../bridge/dispatcher.ts";

interface Message {
  readonly id?: number;
  readonly method?: string;
  readonly params?: Record<string, unknown>;
  readonly result?: unknown;
  readonly error?: { readonly code: number; readonly message: string; readonly data?: { readonly code: string } };
}

let folder: string;
let bundle: string;
const running = new Set<ChildProcess>();

beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "bridge-test-"));
  bundle = path.join(folder, "fake-bridge.mjs");
  const script = new URL("../../../scripts/build-fake-bridge.mjs", import.meta.url).pathname;
  await promisify(execFile)(process.execPath, [script, bundle]);
});
afterEach(() => {
  for (const child of running) child.kill("SIGKILL");
  running.clear();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** A bridge with a framing of our own: what it is held against must not be its own library. */
class Peer {
  readonly child: ChildProcess;
  readonly messages: Message[] = [];
  stderr = "";
  readonly exited: Promise<unknown[]>;
  #bytes = Buffer.alloc(0);

  constructor(command = process.execPath, args: readonly string[] = [bundle]) {
    this.child = spawn(command, args, { stdio: ["pipe", "pipe", "pipe"] });
    running.add(this.child);
    this.exited = once(this.child, "exit");
    this.child.stdout?.on("data", (bytes: Buffer) => this.#receive(bytes));
    this.child.stderr?.on("data", (bytes: Buffer) => {
      this.stderr += bytes.toString();
    });
    this.child.stdin?.on("error", () => undefined);
  }

  write(bytes: string | Buffer): void {
    this.child.stdin?.write(bytes);
  }

  send(message: object): void {
    const text = JSON.stringify({ jsonrpc: "2.0", ...message });
    this.write(`Content-Length: ${Buffer.byteLength(text)}\r\n\r\n${text}`);
  }

  request(id: number, method: string, params: unknown = {}): Promise<Message> {
    this.send({ id, method, params });
    return this.waitFor((message) => message.id === id && message.method === undefined);
  }

  initialize(scfg: object = {}): Promise<Message> {
    return this.request(1, "initialize", {
      "protocol-version": PROTOCOL_VERSION,
      storeid: "bk",
      type: "backup-provider-dir-example",
      scfg,
      nodename: "pve",
    });
  }

  /** A backup that runs: the test double has logged its beginning. */
  async startBackup(id: number): Promise<void> {
    const volumes = { "drive-scsi0": { size: 1, "bitmap-mode": "none" } };
    this.send({ id, method: "backup_vm", params: { vmid: 100, "guest-config": "", volumes, info: {} } });
    await this.waitFor((message) => String(message.params?.message).startsWith("limit"));
  }

  async waitFor(wanted: (message: Message) => boolean): Promise<Message> {
    for (;;) {
      const found = this.messages.find(wanted);
      if (found !== undefined) return found;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  #receive(bytes: Buffer): void {
    this.#bytes = Buffer.concat([this.#bytes, bytes]);
    for (;;) {
      const match = /^Content-Length: (\d+)\r\n\r\n/.exec(this.#bytes.toString("latin1"));
      if (match === null) return;
      const end = match[0].length + Number(match[1]);
      if (this.#bytes.length < end) return;
      this.messages.push(JSON.parse(this.#bytes.subarray(match[0].length, end).toString()) as Message);
      this.#bytes = this.#bytes.subarray(end);
    }
  }
}

describe("the bridge process", () => {
  it("answers what comes one byte at a time, and several requests in one write", async () => {
    const peer = new Peer();
    const text = '{"jsonrpc":"2.0","id":7,"method":"job_cleanup","params":{}}';
    for (const byte of `Content-Length: ${text.length}\r\n\r\n${text}`) peer.write(byte);
    const early = await peer.waitFor((message) => message.id === 7);
    expect(early.error).toMatchObject({ code: -32600, data: { code: "INVALID_REQUEST" } });
    void peer.initialize();
    expect((await peer.request(2, "list_volumes")).result).toMatchObject({ volumes: [{ vmid: 100 }] });
    expect((await peer.request(3, "no_such_method")).error).toMatchObject({ code: -32601 });
    expect((await peer.request(4, "list_volumes", [])).error).toMatchObject({ code: -32602 });
  });

  it("cancels one request and goes on", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "hang" });
    await peer.startBackup(2);
    peer.send({ method: "$/cancelRequest", params: { id: 2 } });
    const answer = await peer.waitFor((message) => message.id === 2);
    expect(answer.error).toMatchObject({ code: -32800, message: 'Cancelled "backup_vm" on request' });
    expect((await peer.request(3, "list_volumes")).error).toBeUndefined();
  });

  it("puts the stack of a bug on stderr, and one line into the answer", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "bug" });
    await peer.startBackup(2);
    const answer = await peer.waitFor((message) => message.id === 2);
    expect(answer.error).toMatchObject({ code: -32603, data: { code: "INTERNAL" } });
    expect(answer.error?.message).not.toContain("\n");
    expect(JSON.parse(peer.stderr)).toMatchObject({ level: 50, method: "backup_vm", err: { type: "TypeError" } });
  });

  it("asks back for dirty regions and gives them up", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "file-handle", "test-timeout-ms": 4001 });
    await peer.startBackup(2);
    const question = await peer.waitFor((message) => message.method === "next_dirty_regions");
    expect(question.params).toEqual({ device: "drive-scsi0", max: 2, seconds: 5 });
    peer.send({ id: question.id, result: { regions: [[0, 8]], done: true } });
    const second = await peer.waitFor((message) => message.method === "deallocate");
    expect(second.params).toEqual({ device: "drive-scsi0", ranges: [[0, 8]] });
    peer.send({ id: second.id, result: null });
    expect((await peer.waitFor((message) => message.id === 2 && message.method === undefined)).result).toBeNull();
  });

  it.each([0, 3_600_001, Number.NaN])("does not ask back for regions within %d ms", async (timeoutMs) => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "file-handle", "test-timeout-ms": String(timeoutMs) });
    await peer.startBackup(2);
    const answer = await peer.waitFor((message) => message.id === 2 && message.method === undefined);
    expect(answer.error).toMatchObject({
      code: -32603,
      message: expect.stringMatching(/: seconds is (0|3601|null), /),
    });
    expect(peer.messages.some(({ method }) => method === "next_dirty_regions")).toBe(false);
  });

  it("refuses an answer that breaks the protocol", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "file-handle" });
    await peer.startBackup(2);
    const question = await peer.waitFor((message) => message.method === "next_dirty_regions");
    peer.send({ id: question.id, result: { regions: [[0, -1]], done: true } });
    const answer = await peer.waitFor((message) => message.id === 2 && message.method === undefined);
    expect(answer.error?.message).toMatch(/^Cannot use the answer to "next_dirty_regions": regions\.0\.1 is -1/);
  });
});

describe("the end of the bridge process", () => {
  it("comes with the end of its input, after the provider is disposed", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "dispose-says" });
    await peer.request(2, "job_cleanup");
    peer.child.stdin?.end();
    expect(await peer.exited).toEqual([0, null]);
    expect(peer.stderr).toContain("provider disposed");
  });

  it("does not come with shutdown alone, which answers first", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "dispose-says" });
    await peer.request(2, "job_cleanup");
    expect((await peer.request(3, "shutdown")).result).toBeNull();
    expect((await peer.request(4, "job_cleanup")).error).toMatchObject({ data: { code: "CANCELLED" } });
    peer.child.stdin?.end();
    expect(await peer.exited).toEqual([0, null]);
  });

  it.each([
    ["SIGTERM", 143],
    ["SIGINT", 130],
    ["SIGHUP", 129],
  ] as const)("comes with %s, which cancels what runs", async (signal, code) => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "hang" });
    await peer.startBackup(2);
    peer.child.kill(signal);
    expect(await peer.exited).toEqual([code, null]);
  });

  it("comes at once with the second signal", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "dispose-hangs" });
    await peer.request(2, "job_cleanup");
    peer.child.kill("SIGTERM");
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(peer.child.exitCode).toBeNull();
    peer.child.kill("SIGTERM");
    expect(await peer.exited).toEqual([143, null]);
  });

  it("comes after ten seconds, although the provider hangs", async () => {
    const peer = new Peer();
    await peer.initialize({ "test-behaviour": "dispose-hangs" });
    await peer.request(2, "job_cleanup");
    const begin = performance.now();
    peer.child.stdin?.end();
    expect(await peer.exited).toEqual([0, null]);
    expect(performance.now() - begin).toBeGreaterThan(9_000);
    expect(performance.now() - begin).toBeLessThan(40_000); // a provider that hangs would never end
  });

  it.each(["Content-Length: x\r\n\r\n{}", "Content-Length: 1\r\n\r\n{", "Content-Type: x\r\n\r\n{}"])(
    "comes with a message that is none: %j",
    async (bytes) => {
      const peer = new Peer();
      await peer.initialize();
      peer.write(bytes);
      expect(await peer.exited).toEqual([1, null]);
      expect(peer.stderr).toMatch(/^Cannot continue: the connection to the Perl side is broken/);
    },
  );
});
