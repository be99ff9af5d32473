// SPDX-License-Identifier: AGPL-3.0-or-later
// Loaded before the bridge: the process stops itself (SIGSTOP) at one file operation, so that a test can kill any
// process at exactly that moment. PBH_TEST_HOLD is "<before|after> <function> <nth> <pattern of a path>".
import { readlinkSync } from "node:fs";
import fs from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";

const [when, name, nth, pattern] = (process.env.PBH_TEST_HOLD ?? "").split(" ");
/** The path of a name in a directory that a descriptor holds open: /proc/self/fd/N/name. */
const named = (path) => path.replace(/^\/proc\/self\/fd\/\d+(?=\/)/, (link) => readlinkSync(link));

if (pattern !== undefined) {
  const original = fs[name];
  const wanted = new RegExp(pattern);
  let left = Number(nth);
  fs[name] = async (...args) => {
    const isIt = args.some((arg) => typeof arg === "string" && wanted.test(named(arg))) && --left === 0;
    if (isIt && when === "before") process.kill(process.pid, "SIGSTOP");
    try {
      return await original(...args);
    } finally {
      if (isIt && when === "after") process.kill(process.pid, "SIGSTOP");
    }
  };
  syncBuiltinESMExports();
}
