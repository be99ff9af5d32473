// SPDX-License-Identifier: AGPL-3.0-or-later
// Entry of the bundle dist/bridge.mjs, and the composition root: which provider serves which storage type. It checks
// Node's version before anything else is evaluated: that is why the rest is imported dynamically, which stays inside
// the one file.

const OLDEST_NODE = [20, 19] as const;

function isNodeTooOld(version: string): boolean {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  return major < OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor < OLDEST_NODE[1]);
}

if (isNodeTooOld(process.versions.node)) {
  const oldest = OLDEST_NODE.join(".");
  process.stderr.write(
    `Cannot start the backup bridge: Node.js is ${process.versions.node}, expected ${oldest} or newer\n`,
  );
  process.exitCode = 3;
} else {
  const { runBridge } = await import("./run-bridge.ts");
  runBridge({
    "backup-provider-dir-example": async (context) =>
      (await import("../src/directory/index.ts")).createProvider(context),
  });
}
