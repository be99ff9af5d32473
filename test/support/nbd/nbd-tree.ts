// SPDX-License-Identifier: AGPL-3.0-or-later
// A fake tree of what the kernel and qemu-nbd show of /dev/nbdX. Needs root, for the device nodes.
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import type { NbdHost } from "../../../src/device/index.ts";

const run = promisify(execFile);
const NBD_MAJOR = 43;

export class NbdTree implements AsyncDisposable {
  readonly dir: string;
  readonly host: NbdHost;

  private constructor(dir: string) {
    this.dir = dir;
    const [sys, dev, sockets, runDir] = ["sys", "dev", "sockets", "run"].map((name) => path.join(dir, name));
    this.host = { sys: `${sys}`, dev: `${dev}`, sockets: `${sockets}`, run: `${runDir}` };
  }

  /** @param nodes value of nbds_max; undefined: the module is not loaded */
  static async create(nodes: number | undefined): Promise<NbdTree> {
    const tree = new NbdTree(await mkdtemp(path.join(os.tmpdir(), "nbd-tree-")));
    for (const folder of Object.values(tree.host)) await mkdir(folder);
    if (nodes === undefined) return tree;
    await mkdir(path.join(tree.host.sys, "module/nbd/parameters"), { recursive: true });
    await writeFile(path.join(tree.host.sys, "module/nbd/parameters/nbds_max"), `${nodes}\n`);
    for (let index = 0; index < nodes; index++) {
      await mkdir(tree.block(index), { recursive: true });
      await tree.setSectors(index, 0);
    }
    const script = 'i=0; while [ $i -lt "$1" ]; do mknod "$0/nbd$i" b "$2" $((i * 32)); i=$((i + 1)); done';
    await run("sh", ["-c", script, tree.host.dev, `${nodes}`, `${NBD_MAJOR}`]);
    return tree;
  }

  /** The directory of the node in sysfs. */
  block(index: number): string {
    return path.join(this.host.sys, `block/nbd${index}`);
  }

  async setSectors(index: number, sectors: number): Promise<void> {
    await writeFile(path.join(this.block(index), "size"), `${sectors}\n`);
  }

  async setPid(index: number, pid: number | undefined): Promise<void> {
    const file = path.join(this.block(index), "pid");
    await (pid === undefined ? rm(file) : writeFile(file, `${pid}\n`));
  }

  /** The socket of a killed qemu-nbd. */
  async leaveSocket(index: number): Promise<string> {
    const file = path.join(this.host.sockets, `qemu-nbd-nbd${index}`);
    const script = "use IO::Socket::UNIX; IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 1) or die $!";
    await run("perl", ["-e", script, file]);
    return file;
  }

  get reservationFile(): string {
    return path.join(this.host.run, "qemu-server/reserved-dev-nbd-nodes");
  }

  get lockFile(): string {
    return path.join(this.host.run, "lock/qemu-server/reserved-dev-nbd-nodes.lock");
  }

  /** Text of the reservation file; empty if there is none. */
  async reservations(): Promise<string> {
    return await readFile(this.reservationFile, "utf8").catch(() => "");
  }

  async writeReservations(text: string): Promise<void> {
    await mkdir(path.dirname(this.reservationFile), { recursive: true });
    await writeFile(this.reservationFile, text);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.dir, { recursive: true, force: true });
  }
}
