// SPDX-License-Identifier: AGPL-3.0-or-later
// `node dist/test-vm.mjs KERNEL_FOLDER`: makes a store, boots the test machine with it, prints the verdict.
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { GuestRoot } from "../../fixtures/vm/guest-root.ts";
import { runMachine } from "../../fixtures/vm/machine.ts";
import { TestNode } from "../support/node/test-node.ts";
import { Judge } from "./judge.ts";
import { makeStore } from "./made-store.ts";
import { EXPECTED_FILE, type Expected, GUEST_PROGRAM, GUEST_STORE, NBD_MODULE_FOLDER } from "./protocol.ts";

/** Far above what a busy host needs; they only end a machine that hangs. */
const BOOT_TIMEOUT_MS = 120_000;
const TIMEOUT_MS = 1_200_000;
const CONSOLE_LINES = 80;
const dist = import.meta.dirname;

async function buildInitrd(work: string, kernelDir: string, expected: Expected, store: string): Promise<string> {
  const dir = path.join(work, "root");
  await mkdir(dir);
  const root = await GuestRoot.create(dir);
  await root.add(path.join(dist, "../fixtures/vm/init"), "init");
  for (const name of await readdir(kernelDir)) {
    if (name.includes(".ko")) await root.add(path.join(kernelDir, name), path.join(NBD_MODULE_FOLDER, name));
  }
  await root.add(path.join(dist, "test-vm-guest.mjs"), GUEST_PROGRAM);
  await root.add(path.join(dist, "node_modules"), path.join(path.dirname(GUEST_PROGRAM), "node_modules"));
  await root.add(store, GUEST_STORE);
  const list = path.join(work, "expected.json");
  await writeFile(list, JSON.stringify(expected));
  await root.add(list, EXPECTED_FILE);
  const initrd = path.join(work, "initrd.cpio");
  await root.pack(initrd);
  return initrd;
}

async function main(kernelDir: string): Promise<number> {
  const work = await mkdtemp(path.join(tmpdir(), "pbh-vm-"));
  const judge = new Judge((line) => console.log(line));
  try {
    await using node = await TestNode.create();
    const points = await makeStore(node);
    const initrd = await buildInitrd(work, kernelDir, { points }, node.storePath);
    const consoleFile = path.join(work, "console");
    const kernel = path.join(kernelDir, "vmlinuz");
    const onLine = (line: string): void => judge.take(line);
    const limits = { bootTimeoutMs: BOOT_TIMEOUT_MS, timeoutMs: TIMEOUT_MS };
    judge.finish(await runMachine({ kernel, initrd, consoleFile, ...limits, onLine }));
    if (judge.failed > 0) await showConsole(consoleFile);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  console.log(`${judge.passed} passed, ${judge.failed} failed`);
  return judge.failed === 0 ? 0 : 1;
}

async function showConsole(file: string): Promise<void> {
  const lines = (await readFile(file, "utf8").catch(() => "")).split(/\r?\n/);
  console.log(`The last lines of the machine's console:\n${lines.slice(-CONSOLE_LINES).join("\n")}`);
}

process.exitCode = await main(process.argv[2] ?? "").catch((error: unknown) => {
  console.log(`FAILED  vm: ${error instanceof Error ? error.stack : String(error)}\n0 passed, 1 failed`);
  return 1;
});
