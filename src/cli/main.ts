// SPDX-License-Identifier: AGPL-3.0-or-later
// pve-backup-host: looks into a store. Backups are made by vzdump and restored by qmrestore and pct.
import { hostname } from "node:os";
import path from "node:path";
import { Command, CommanderError, InvalidArgumentError } from "commander";
import packageJson from "../../package.json" with { type: "json" };
import { CancelledError, HostError, messageOf } from "../core/index.ts";
import { Store } from "../store/index.ts";
import { resolveBackupName } from "./backup-name.ts";
import { check } from "./check.ts";
import { EXIT_STATUS, ExitCode, exitCodeOf } from "./exit-codes.ts";
import { list } from "./list.ts";
import { complain, print } from "./output.ts";

const abort = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) {
  process.once(name, () => abort.abort(new CancelledError(`Interrupted by ${name}`)));
}

function parseVmid(text: string): number {
  if (!/^[1-9][0-9]{2,8}$/.test(text)) throw new InvalidArgumentError("expected a guest id from 100 to 999999999");
  return Number(text);
}

/** The storage id makes no difference to a reader. */
function openStore(storePath: string, warn: (message: string) => void = () => undefined): Promise<Store> {
  return Store.open({
    path: path.resolve(storePath),
    storeid: "cli",
    root: process.env.PVE_BACKUP_HOST_ROOT ?? "",
    nodename: hostname(),
    warn: (message) => {
      complain(`warning: ${message}`);
      warn(message);
    },
  });
}

/** What --help and --version say; printed at the end, like everything else. */
let announced = "";

const program = new Command("pve-backup-host")
  .description("Looks into a backup store of the Proxmox VE directory provider.")
  .version(packageJson.version, "-V, --version")
  .configureOutput({
    writeOut: (text) => {
      announced += text;
    },
    writeErr: (text) => complain(text.trimEnd()),
  })
  .addHelpText("after", `\nExit status: ${EXIT_STATUS}. See pve-backup-host(1).`)
  .exitOverride();

program
  .command("list")
  .description("list the backups of a store")
  .argument("<path>", "path of the storage, as in storage.cfg")
  .option("--vmid <id>", "only the backups of this guest", parseVmid)
  .option("--json", "print a JSON array")
  .action(async (storePath: string, options: { vmid?: number; json?: boolean }) => {
    // An incomplete listing is printed, but it is not a success.
    const warn = (): void => {
      process.exitCode = ExitCode.Unreadable;
    };
    await using store = await openStore(storePath, warn);
    await list(store, options, abort.signal);
  });

program
  .command("check")
  .description("check whether a backup can be restored, without restoring it")
  .argument("<path>", "path of the storage, as in storage.cfg")
  .argument("<backup>", "name of the backup, as `list` or `pvesm list` prints it, or the path of its directory")
  .action(async (storePath: string, backup: string) => {
    const archive = await resolveBackupName(backup, storePath);
    await using store = await openStore(storePath);
    await check(store, archive, abort.signal);
  });

try {
  await program.parseAsync();
} catch (error) {
  process.exitCode = await report(error);
}

async function report(error: unknown): Promise<ExitCode> {
  if (error instanceof CommanderError) {
    if (error.exitCode !== 0) return ExitCode.Usage; // it has already printed why
    return await print(announced, abort.signal).then(() => ExitCode.Ok, report);
  }
  const code = exitCodeOf(error);
  if (code === ExitCode.OutputClosed) return code;
  const hint = error instanceof HostError && error.hint !== undefined ? `; ${error.hint}` : "";
  complain(`error: ${messageOf(error)}${hint}`);
  return code;
}
