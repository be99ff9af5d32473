// SPDX-License-Identifier: AGPL-3.0-or-later
// The wait for a server; a shell plays it, the questions are made up.

import { tmpdir } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { waitUntilServed } from "../../../src/device/wait-until-served.ts";
import { ChildProcess } from "../../../src/host/index.ts";
import { requireTool } from "../../support/programs/tools.ts";

const never = new AbortController().signal;
let server: ChildProcess;

beforeEach(async (context) => {
  requireTool(context, "setpriv");
  server = await ChildProcess.start("sleep", ["60"], { cwd: tmpdir() });
});

afterEach(async () => await server[Symbol.asyncDispose]());

const wait = (options: { timeoutMs?: number; signal?: AbortSignal; servers?: ChildProcess[] } = {}) => ({
  ...{ act: 'Cannot offer "a"', servers: [server], timeoutMs: 20_000, signal: never },
  ...options,
});

/** Never answers; counts how often it is asked. */
function hangingQuestion(): { asked: number; ask: () => Promise<undefined> } {
  const question = {
    asked: 0,
    ask: () => {
      question.asked++;
      return new Promise<undefined>(() => undefined);
    },
  };
  return question;
}

describe("waitUntilServed()", () => {
  it("asks until there is an answer, and takes 0 for one", async () => {
    const answers = [undefined, false, undefined, 0, 1] as const;
    let asked = 0;
    expect(await waitUntilServed(wait(), async () => answers[asked++])).toBe(0);
    expect(asked).toBe(4);
  });

  it("asks no second time before the first answer is there, and takes that however late it comes", async () => {
    let asked = 0;
    const ask = async (): Promise<string> => {
      asked++;
      await sleep(300);
      return "late";
    };
    expect(await waitUntilServed(wait(), ask)).toBe("late");
    expect(asked).toBe(1);
  });

  it("ends with what the question throws", async () => {
    const problem = new Error("another size");
    await expect(waitUntilServed(wait(), () => Promise.reject(problem))).rejects.toBe(problem);
  });

  it("ends with the abort reason while a question hangs", async () => {
    const aborter = new AbortController();
    const reason = new Error("the job was cancelled");
    setTimeout(() => aborter.abort(reason), 100);
    const question = hangingQuestion();
    await expect(waitUntilServed(wait({ signal: aborter.signal }), question.ask)).rejects.toBe(reason);
    expect(question.asked).toBe(1);
  });

  it("asks nothing for a job that is cancelled already", async () => {
    const question = hangingQuestion();
    const signal = AbortSignal.abort(new Error("cancelled"));
    await expect(waitUntilServed(wait({ signal }), question.ask)).rejects.toThrow("cancelled");
    expect(question.asked).toBe(0);
  });

  it("tells which server ended while a question hangs", async () => {
    await using other = await ChildProcess.start("sh", ["-c", "echo no such image >&2; exit 7"], { cwd: tmpdir() });
    const waiting = waitUntilServed(wait({ servers: [server, other] }), hangingQuestion().ask);
    await expect(waiting).rejects.toThrow(/^Cannot offer "a": sh ended with status 7: no such image$/);
    await expect(waiting).rejects.toMatchObject({ code: "CHILD_PROCESS" });
  });

  it("names the servers that gave no answer in time, while a question hangs", async () => {
    const waiting = waitUntilServed(wait({ servers: [server, server], timeoutMs: 200 }), hangingQuestion().ask);
    await expect(waiting).rejects.toThrow(/^Cannot offer "a": no answer from sleep and sleep within 0.2 s$/);
  });

  it("leaves a question behind that fails after the end of the wait, and nobody hears of it", async () => {
    const unheard: unknown[] = [];
    const listen = (reason: unknown): void => void unheard.push(reason);
    process.on("unhandledRejection", listen);
    const ask = async (): Promise<never> => {
      await sleep(200);
      throw new Error("too late");
    };
    await expect(waitUntilServed(wait({ timeoutMs: 50 }), ask)).rejects.toThrow("no answer");
    await sleep(300);
    process.off("unhandledRejection", listen);
    expect(unheard).toEqual([]);
  });
});
