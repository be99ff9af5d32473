// SPDX-License-Identifier: AGPL-3.0-or-later
import { describe, expect, it, vi } from "vitest";
import { Dispatcher, PROTOCOL_VERSION } from "../../../bridge/dispatcher.ts";
import { PROVIDER_METHODS } from "../../../bridge/methods.ts";
import { CancelledError } from "../../../src/core/index.ts";
import type { BackupHooks, ProviderFactory } from "../../../src/provider/index.ts";
import { createFakeProvider } from "../../support/bridge/fake-provider.ts";

const TYPE = "some-type";
const hello = { "protocol-version": PROTOCOL_VERSION, storeid: "bk", type: TYPE, scfg: {}, nodename: "pve" };
const never = new AbortController().signal;

function start(createProvider: ProviderFactory = createFakeProvider) {
  const lines: string[] = [];
  const fileHandles = { nextDirtyRegions: vi.fn(), deallocate: vi.fn() };
  const log = (level: string, message: string) => void lines.push(`${level}: ${message}`);
  return { dispatcher: new Dispatcher({ providers: { [TYPE]: createProvider }, log, fileHandles }), lines };
}

/** A provider that is the test double, but for these members. */
function withMembers(backup: Partial<BackupHooks>, dispose?: () => Promise<void>): ProviderFactory {
  return async (context) => {
    const provider = await createFakeProvider(context);
    const ending = dispose === undefined ? {} : { [Symbol.asyncDispose]: dispose };
    return { ...provider, backup: { ...provider.backup, ...backup }, ...ending };
  };
}

describe("Dispatcher.dispatch()", () => {
  it("refuses every method before initialize", async () => {
    const { dispatcher } = start();
    for (const method of [...Object.keys(PROVIDER_METHODS), "shutdown"]) {
      await expect(dispatcher.dispatch(method, {}, never)).rejects.toThrow("initialize must come first");
    }
  });

  it("refuses a second initialize", async () => {
    const { dispatcher } = start();
    await dispatcher.dispatch("initialize", hello, never);
    await expect(dispatcher.dispatch("initialize", hello, never)).rejects.toThrow("already initialized");
  });

  it("names both versions and the remedy for another protocol, whatever else is in the params", async () => {
    const { dispatcher } = start();
    await expect(
      dispatcher.dispatch("initialize", { "protocol-version": 7, nonsense: 1 }, never),
    ).rejects.toMatchObject({
      code: "PROTOCOL_VERSION",
      message: "Cannot initialize the backup bridge: it speaks protocol version 3, the Perl side 7",
      hint: expect.stringContaining("restart"),
    });
  });

  it.each([
    undefined,
    null,
    [],
    {},
    { "protocol-version": "1" },
    { "protocol-version": 1.5 },
    { "protocol-version": PROTOCOL_VERSION },
  ])("refuses initialize with %j", async (params) => {
    await expect(start().dispatcher.dispatch("initialize", params, never)).rejects.toMatchObject({
      code: "INVALID_PARAMS",
    });
  });

  it.each(["nonsense", "toString", "constructor", "__proto__", "next_dirty_regions", "log"])(
    "has no method %s",
    async (method) => {
      const { dispatcher } = start();
      await dispatcher.dispatch("initialize", hello, never);
      await expect(dispatcher.dispatch(method, {}, never)).rejects.toMatchObject({ code: "METHOD_NOT_FOUND" });
    },
  );

  it.each([
    ["backup_init", { vmid: "100", vmtype: "qemu", "start-time": 1 }, /vmid is "100", which must be integer/],
    ["backup_init", { vmid: 100, vmtype: "qemu" }, /must have required property 'start-time'/],
    ["job_init", { "start-time": 1, x: 1 }, /unknown parameter "x"/],
    ["restore_vm_init", { volname: "backup/100/qemu-1/../../x" }, /volname is "backup/],
    ["restore_vm_init", { volname: "backup/a/./b" }, /volname is "backup/],
    ["restore_vm_init", { volname: "backup//etc" }, /volname is "backup/],
    ["restore_vm_init", { volname: "100/qemu-1" }, /volname is "100/],
    ["prune_backups", { keep: { "keep-sometimes": 1 }, dryrun: true }, /unknown parameter "keep-sometimes"/],
    ["prune_backups", { keep: { "keep-last": -1 }, dryrun: true }, /keep-last is -1/],
    ["restore_vm_volume_init", { volname: "backup/100/qemu-1", "device-name": "../x" }, /device-name is "..\/x"/],
    ["backup_vm", { vmid: 100, "guest-config": "ä", volumes: {}, info: {} }, /guest-config is "ä"/],
    ["backup_vm_query_incremental", { vmid: 100, volumes: { "a\0b": { size: 1 } } }, /name "a\\u0000b"/],
    ["backup_vm_query_incremental", { vmid: 100, volumes: { a: { size: 2 ** 53 } } }, /volumes.a.size/],
  ])("refuses %s with %j", async (method, params, message) => {
    const { dispatcher } = start();
    await dispatcher.dispatch("initialize", hello, never);
    await expect(dispatcher.dispatch(method, params, never)).rejects.toThrow(message);
  });

  it("makes one provider, at the first method that needs it", async () => {
    const create = vi.fn(createFakeProvider);
    const { dispatcher } = start(create);
    await dispatcher.dispatch("initialize", hello, never);
    expect(create).not.toHaveBeenCalled();
    await Promise.all([dispatcher.dispatch("job_cleanup", {}, never), dispatcher.dispatch("list_volumes", {}, never)]);
    expect(create).toHaveBeenCalledTimes(1);
  });

  it("treats a result that breaks the protocol as a bug", async () => {
    const { dispatcher } = start(withMembers({ backupInit: async () => ({ archiveName: "../x" }) }));
    await dispatcher.dispatch("initialize", hello, never);
    const params = { vmid: 100, vmtype: "qemu", "start-time": 1 };
    await expect(dispatcher.dispatch("backup_init", params, never)).rejects.toThrow(/^Result of "backup_init" breaks/);
  });

  it("names bitmaps by a steady name for use and by a fresh one for new", async () => {
    const { dispatcher } = start();
    await dispatcher.dispatch("initialize", hello, never);
    const volumes = { "drive-scsi0": { size: 2_000_000 }, "drive-scsi1": { size: 1 } };
    const before = Date.now();
    const result = await dispatcher.dispatch("backup_vm_available_bitmaps", { vmid: 100, volumes }, never);
    const { devices } = result as { devices: Record<string, string> };
    expect(devices["drive-scsi0"]).toBe("bk");
    expect(Number(devices["drive-scsi1"]?.replace(/^bk-/, ""))).toBeGreaterThanOrEqual(before);
  });
});

describe("the provider table", () => {
  it.each(["unknown-type", "toString", "constructor"])("has one clear error for the storage type %j", async (type) => {
    const { dispatcher } = start();
    await expect(
      dispatcher.dispatch("initialize", { ...hello, type: type.toLowerCase() }, never),
    ).rejects.toMatchObject({
      code: "INVALID_PARAMS",
      message: `Cannot serve storage "bk": there is no provider for the storage type "${type.toLowerCase()}"`,
    });
  });

  it("chooses by the storage type", async () => {
    const [one, two] = [vi.fn(createFakeProvider), vi.fn(createFakeProvider)];
    const fileHandles = { nextDirtyRegions: vi.fn(), deallocate: vi.fn() };
    const dispatcher = new Dispatcher({ providers: { one, two }, log: () => undefined, fileHandles });
    await dispatcher.dispatch("initialize", { ...hello, type: "two" }, never);
    await dispatcher.dispatch("job_cleanup", {}, never);
    expect([one.mock.calls.length, two.mock.calls.length]).toEqual([0, 1]);
  });
});

describe("Dispatcher.end()", () => {
  it("aborts what runs, waits for it, and only then disposes the provider", async () => {
    const events: string[] = [];
    const { dispatcher } = start(
      withMembers(
        {
          jobCleanup: async (signal) => {
            await new Promise((resolve) => signal.addEventListener("abort", resolve));
            await new Promise((resolve) => setTimeout(resolve, 20));
            events.push(`cleaned up after: ${(signal.reason as Error).message}`);
            signal.throwIfAborted();
          },
        },
        async () => void events.push("disposed"),
      ),
    );
    await dispatcher.dispatch("initialize", hello, never);
    const running = dispatcher.dispatch("job_cleanup", {}, never).catch((error: unknown) => error);
    await new Promise((resolve) => setTimeout(resolve, 20));
    await Promise.all([dispatcher.end("the test ends"), dispatcher.end("again")]);
    expect(events).toEqual(["cleaned up after: Cancelled: the test ends", "disposed"]);
    expect(await running).toBeInstanceOf(CancelledError);
    await expect(dispatcher.dispatch("job_cleanup", {}, never)).rejects.toBeInstanceOf(CancelledError);
  });

  it("is what shutdown does", async () => {
    const dispose = vi.fn(async () => {});
    const { dispatcher } = start(withMembers({}, dispose));
    await dispatcher.dispatch("initialize", hello, never);
    await dispatcher.dispatch("job_cleanup", {}, never);
    expect(await dispatcher.dispatch("shutdown", {}, never)).toBeNull();
    expect(dispose).toHaveBeenCalledTimes(1);
  });

  it("has nothing to dispose if the provider could not be made", async () => {
    const { dispatcher } = start(async () => {
      throw new Error("no provider");
    });
    await dispatcher.dispatch("initialize", hello, never);
    await expect(dispatcher.dispatch("job_cleanup", {}, never)).rejects.toThrow("no provider");
    await dispatcher.end("the test ends");
  });
});
