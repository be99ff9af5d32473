// SPDX-License-Identifier: AGPL-3.0-or-later
// The real bridge with the real provider as a separate process, to be ended in every possible way.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { PROTOCOL_VERSION } from "../../../bridge/dispatcher.ts";
import type { LabBackup, LabGuest } from "../../../fixtures/lab/index.ts";
import type { TestNode } from "../node/test-node.ts";
import { type Bundle, buildProgram } from "../programs/bundle.ts";

export type BridgeBundle = Bundle;

interface BridgeOptions {
  /** Name of another host: the process gets a separate host name and pid namespace. */
  readonly host?: string;
}

/** @param entryPoint the release's entry point, or one that starts the bridge in another way */
export const buildBridge = (entryPoint = "bridge/main.ts"): Promise<BridgeBundle> => buildProgram(entryPoint);

/** Arguments of unshare(1) for a process that lives, and dies, as if on another host. */
function asHost(host: string, bundle: string): string[] {
  const inside = ["sh", "-c", 'hostname "$0"; exec "$@"', host, process.execPath, bundle];
  return ["--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "--", ...inside];
}

interface Answer {
  readonly id?: number;
  readonly method?: string;
  readonly result?: Record<string, unknown>;
  readonly error?: { readonly message: string };
}

export class BridgeProcess implements AsyncDisposable {
  readonly child: ChildProcess;
  readonly #exit: Promise<unknown[]>;
  readonly #waiting = new Map<number, (answer: Answer | undefined) => void>();
  #received = Buffer.alloc(0);
  #nextId = 1;

  private constructor(bundle: string, node: TestNode, host: string | undefined) {
    const [command, args] = host === undefined ? [process.execPath, [bundle]] : ["unshare", asHost(host, bundle)];
    this.child = spawn(command, args, {
      stdio: ["pipe", "pipe", "ignore"],
      env: { ...process.env, PVE_BACKUP_HOST_ROOT: node.root },
    });
    this.#exit = once(this.child, "exit");
    this.child.stdin?.on("error", () => undefined);
    this.child.stdout?.on("data", (bytes: Buffer) => this.#receive(bytes));
    this.child.once("close", () => {
      for (const settle of this.#waiting.values()) settle(undefined);
    });
  }

  static async start(bundle: BridgeBundle, node: TestNode, { host }: BridgeOptions = {}): Promise<BridgeProcess> {
    const bridge = new BridgeProcess(bundle.path, node, host);
    const { storeid, storePath } = node;
    const scfg = {
      path: storePath,
      "vm-backup-mode": "incremental",
      "dir-compression": "none",
      "dir-device-view": "fuse",
    };
    const type = "backup-provider-dir-example";
    const hello = { "protocol-version": PROTOCOL_VERSION, storeid, type, scfg, nodename: host ?? "node1" };
    await bridge.call("initialize", hello);
    return bridge;
  }

  /** Pid of Node itself, as this host sees it; the Node of another host is a child of the started process. */
  async nodePid(): Promise<number> {
    const pid = this.child.pid ?? 0;
    const children = await readFile(`/proc/${pid}/task/${pid}/children`, "latin1");
    return this.child.spawnfile === "unshare" ? Number(children.trim()) : pid;
  }

  /** @returns undefined if the process ended before it answered @throws an Error with the message of the answer */
  async call(method: string, params: object): Promise<Record<string, unknown> | undefined> {
    const id = this.#nextId++;
    const text = JSON.stringify({ jsonrpc: "2.0", id, method, params });
    const answer = await new Promise<Answer | undefined>((resolve) => {
      if (this.child.exitCode !== null || this.child.signalCode !== null) resolve(undefined);
      this.#waiting.set(id, resolve);
      this.child.stdin?.write(`Content-Length: ${Buffer.byteLength(text)}\r\n\r\n${text}`);
    });
    if (answer?.error !== undefined) throw new Error(answer.error.message);
    return answer === undefined ? undefined : (answer.result ?? {});
  }

  /** The calls up to the open access. */
  async openJob(guest: LabGuest, epoch: number, oracleDir: string): Promise<LabBackup> {
    const { vmid } = guest;
    await this.call("job_init", { "start-time": epoch });
    await this.call("backup_init", { vmid, vmtype: "qemu", "start-time": epoch });
    const volumes = Object.fromEntries(guest.devices);
    const answer = await this.call("backup_vm_query_incremental", { vmid, volumes });
    return await guest.openBackup({ modes: (answer?.devices ?? {}) as Record<string, "new" | "use">, oracleDir });
  }

  /** @returns false if the process ended before it answered */
  async copyDisks(guest: LabGuest, access: LabBackup, bandwidthLimit = 0): Promise<boolean> {
    const params = {
      vmid: guest.vmid,
      "guest-config": Buffer.from(guest.guestConfig).toString("base64"),
      volumes: access.volumes,
      info: { "bandwidth-limit": bandwidthLimit },
    };
    return (await this.call("backup_vm", params)) !== undefined;
  }

  /** Ends it and waits. @returns exit code and signal */
  async end(how: NodeJS.Signals | "EOF"): Promise<unknown[]> {
    if (how === "EOF") this.child.stdin?.end();
    else this.child.kill(how);
    return await this.#exit;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.child.exitCode === null && this.child.signalCode === null) await this.end("SIGKILL");
  }

  #receive(bytes: Buffer): void {
    this.#received = Buffer.concat([this.#received, bytes]);
    for (;;) {
      const header = /^Content-Length: (\d+)\r\n\r\n/.exec(this.#received.toString("latin1", 0, 64));
      if (header === null) return;
      const end = header[0].length + Number(header[1]);
      if (this.#received.length < end) return;
      const answer = JSON.parse(this.#received.toString("utf8", header[0].length, end)) as Answer;
      this.#received = this.#received.subarray(end);
      if (answer.id !== undefined && answer.method === undefined) this.#waiting.get(answer.id)?.(answer);
    }
  }
}
