// SPDX-License-Identifier: AGPL-3.0-or-later
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { isInternal, ProtocolError, toRpcError } from "../../../bridge/error-map.ts";
import { CancelledError, EnvironmentError, UnsupportedError } from "../../../src/core/index.ts";

describe("toRpcError()", () => {
  it("gives a HostError's message, code and hint", () => {
    const error = new UnsupportedError("Cannot do this", { hint: "do\nthat" });
    expect(toRpcError(error)).toEqual({
      code: -32002,
      message: "Cannot do this",
      data: { code: "NOT_SUPPORTED", hint: "do that" },
    });
  });

  it("leaves the hint out where there is none", () => {
    expect(toRpcError(new EnvironmentError("Cannot write"))).toEqual({
      code: -32003,
      message: "Cannot write",
      data: { code: "ENVIRONMENT" },
    });
  });

  it("prefers the error of the body to the one of its disposal", async () => {
    const run = async () => {
      await using _resource = {
        async [Symbol.asyncDispose]() {
          throw new Error("closing failed too");
        },
      };
      throw new UnsupportedError("Cannot do this");
    };
    const error = await run().catch((thrown: unknown) => thrown);
    expect((error as Error).name).toBe("SuppressedError");
    expect(toRpcError(error).message).toBe("Cannot do this");
    expect(isInternal(error)).toBe(false);
  });

  it("finds the reason of an abort behind Node's own AbortError", async () => {
    const controller = new AbortController();
    const waiting = sleep(10_000, undefined, { signal: controller.signal }).catch((thrown: unknown) => thrown);
    controller.abort(new CancelledError("Cancelled by the test"));
    expect(toRpcError(await waiting)).toEqual({
      code: -32800,
      message: "Cancelled by the test",
      data: { code: "CANCELLED" },
    });
  });

  it("finds it through aborts and failed disposals within each other", () => {
    const disposed = (suppressed: unknown) => Object.assign(new Error("closing failed too"), { suppressed });
    const aborted = (cause: unknown) => Object.assign(new Error("aborted", { cause }), { name: "AbortError" });
    const reason = new CancelledError("Cancelled by the test");
    for (const error of [disposed(aborted(reason)), aborted(disposed(aborted(disposed(reason))))]) {
      expect(toRpcError(error).message).toBe("Cancelled by the test");
    }
    expect(toRpcError(aborted(undefined)).message).toBe("Internal error of the backup bridge: aborted");
  });

  it("says INTERNAL for a bug, in one line", () => {
    const error = new TypeError("x is\nundefined");
    expect(isInternal(error)).toBe(true);
    expect(toRpcError(error)).toEqual({
      code: -32603,
      message: "Internal error of the backup bridge: x is undefined",
      data: { code: "INTERNAL" },
    });
  });

  it("survives what is no error at all, and errors that contain themselves", () => {
    expect(toRpcError("just text").message).toContain("just text");
    const loop = new Error("loop");
    loop.name = "AbortError";
    loop.cause = loop;
    expect(toRpcError(loop).data.code).toBe("INTERNAL");
  });

  it("keeps the protocol's own errors apart from bugs", () => {
    const error = new ProtocolError("METHOD_NOT_FOUND", "no such method");
    expect(isInternal(error)).toBe(false);
    expect(toRpcError(error).code).toBe(-32601);
  });
});
