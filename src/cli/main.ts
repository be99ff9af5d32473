// SPDX-License-Identifier: AGPL-3.0-or-later
// pve-backup-host: looks into a store. Backups are made by vzdump and restored by qmrestore.
import { hostname } from "node:os";
import path from "node:path";
import { Command, CommanderError, InvalidArgumentError } from "commander";
import packageJson from "../../package.json" with { type: "json" };
import { CancelledError, HostError, messageOf } from "../core/index.ts";
import { Store } from "../store/index.ts";
import { check } from "./check.ts";
import { ExitCode, exitCodeOf } from "./exit-codes.ts";
import { list } from "./list.ts";

const abort = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) {
  process.once(name, () => abort.abort(new CancelledError(`Interrupted by ${name}`)));
}

function parseVmid(text: string): number {
  if (!/^[1-9][0-9]{2,8}$/.test(text)) throw new InvalidArgumentError("a guest id from 100 to 999999999 is wanted");
  return Number(text);
}

/** The storage id decides nothing for a reader. */
function openStore(storePath: string): Promise<Store> {
  return Store.open({
    path: path.resolve(storePath),
    storeid: "cli",
    root: process.env.PVE_BACKUP_HOST_ROOT ?? "",
    nodename: hostname(),
    warn: (message) => console.error(`warning: ${message}`),
  });
}

const program = new Command("pve-backup-host")
  .description("Looks into a backup store of the Proxmox VE directory provider.")
  .version(packageJson.version, "-V, --version")
  .exitOverride();

program
  .command("list")
  .description("list the backups of a store")
  .argument("<path>", "path of the storage, as in storage.cfg")
  .option("--vmid <id>", "only this guest", parseVmid)
  .option("--json", "print a JSON array")
  .action(async (storePath: string, options: { vmid?: number; json?: boolean }) => {
    await using store = await openStore(storePath);
    await list(store, options, abort.signal);
  });

program
  .command("check")
  .description("check whether a backup can be restored, without restoring it")
  .argument("<path>", "path of the storage, as in storage.cfg")
  .argument("<backup>", "name of the backup, as `list` prints it: 100/qemu-1763802000")
  .action(async (storePath: string, backup: string) => {
    await using store = await openStore(storePath);
    await check(store, backup, abort.signal);
  });

try {
  await program.parseAsync();
} catch (error) {
  process.exitCode = report(error);
}

function report(error: unknown): ExitCode {
  if (error instanceof CommanderError) return error.exitCode === 0 ? ExitCode.Ok : ExitCode.Usage; // it has spoken
  const hint = error instanceof HostError && error.hint !== undefined ? `; ${error.hint}` : "";
  console.error(`error: ${messageOf(error)}${hint}`);
  return exitCodeOf(error);
}
