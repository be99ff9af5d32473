// SPDX-License-Identifier: AGPL-3.0-or-later
// A node with one container: the real bridge behind the scripted vzdump and pct of fixtures/pve, real user namespaces
// and real mounts, each in a separate mount namespace.
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmod,
  copyFile,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  symlink,
  writeFile,
} from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { TestNode } from "../node/test-node.ts";
import { bundleInto } from "../programs/bundle.ts";
import { type Program, startScript, watch } from "../programs/scripted-pve.ts";

const run = promisify(execFile);
const project = path.resolve(import.meta.dirname, "../../..");
export const VMID = 101;

/** What the kernel, tar and squashfs can all preserve; the owners are those of an unprivileged container. */
const MAKE_CONTAINER = `
set -e
mkdir -p "$1" "$2"; cd "$1"
mkdir -p bin sbin etc dev proc sys tmp var/tmp var/log usr/bin home/u mnt/data root lost+found
echo init > sbin/init; echo ct > etc/hostname
for i in $(seq 12); do head -c 5000 /dev/urandom > usr/bin/f$i; done
ln usr/bin/f1 usr/bin/f1-hard; ln -s f2 usr/bin/f2-sym; mkfifo var/fifo
truncate -s 10M var/sparse; echo end >> var/sparse
echo x > "home/u/odd name \\"'\\$;é"; printf nl > $'home/u/new\\nline'; printf bad > $'home/u/\\xff\\xfe'
echo junk > tmp/junk; echo junk > var/tmp/junk; echo gone > home/u/secret; touch -d 2001-02-03T04:05:06 etc/old
setfattr -n user.lab -v hello etc/hostname
chown -R 100000:100000 .; chown -R 101000:101000 home/u; chmod 4755 sbin/init; chmod 700 root; chown 100000:100042 etc/old
chown 0:0 lost+found
cd "$2"; echo data > file; mkdir d; echo deep > d/deep; chown -R 100000:100000 .
`;
const FEW_EXCLUDES = ["/home/u/secret"];
/** What the standard patterns and FEW_EXCLUDES leave out of the container above. */
export const LEFT_OUT = ["home/u/secret", "lost+found", "tmp/junk", "var/tmp/junk"];

export class ContainerNode extends TestNode {
  readonly containerRoot: string;
  readonly dataVolume: string;
  #jobs = 0;

  private constructor(dir: string, scfg: Record<string, unknown>) {
    super(dir, scfg);
    this.containerRoot = path.join(dir, "ct/root");
    this.dataVolume = path.join(dir, "ct/data");
  }

  static override async create(scfg: Record<string, unknown> = {}): Promise<ContainerNode> {
    const node = new ContainerNode(await mkdtemp(path.join(tmpdir(), "pbh-ct-")), scfg);
    await chmod(node.dir, 0o755); // the bundle is in it, and the container's root starts it
    await mkdir(path.join(node.dir, "log"), { mode: 0o700 });
    await run("bash", ["-c", MAKE_CONTAINER, "-", node.containerRoot, node.dataVolume]);
    await writeFile(path.join(node.dir, "101.conf"), "arch: amd64\nhostname: ct\nunprivileged: 1\n# \u00e4\n");
    await writeFile(path.join(node.dir, "101.fw"), "[OPTIONS]\nenable: 0\n");
    await bundleInto(node.bundle, "bridge/main.ts");
    await chmod(node.bundle, 0o644);
    await copyFile(path.join(project, "dist/compress-worker.cjs"), path.join(node.dir, "compress-worker.cjs"));
    await symlink(path.join(project, "node_modules"), path.join(node.dir, "node_modules"));
    return node;
  }

  get bundle(): string {
    return path.join(this.dir, "bridge.mjs");
  }

  /** vzdump of the container. `guest` and `job` are added to the job file. */
  async vzdump(
    guest: Record<string, unknown> = {},
    { job = {}, args = [] }: { job?: Record<string, unknown>; args?: readonly string[] } = {},
  ): Promise<Program> {
    const jobFile = await this.#writeJob({
      guests: [
        {
          vmid: VMID,
          type: "lxc",
          config: path.join(this.dir, "101.conf"),
          firewall: path.join(this.dir, "101.fw"),
          root: this.containerRoot,
          mounts: { "/mnt/data": this.dataVolume },
          excludes: FEW_EXCLUDES,
          "backup-time": 1_700_000_000 + this.#jobs,
          ...guest,
        },
      ],
      ...job,
    });
    return this.#start("vzdump.pl", ["--job", jobFile, ...args]);
  }

  /** pct restore into a directory, with the owners as on the node. */
  async restore(volname: string, target: string, args: readonly string[] = [], bundle = this.bundle): Promise<Program> {
    await mkdir(target, { recursive: true });
    await run("chown", ["100000:100000", target]);
    const jobFile = await this.#writeJob({ guests: [] });
    const archive = `${this.storeid}:${volname}`;
    return this.#start("pctrestore.pl", ["--job", jobFile, "--archive", archive, "--target", target, ...args], bundle);
  }

  /** Volume names of the complete points in the store; anything else in it fails the test. */
  async points(): Promise<string[]> {
    const folder = path.join(this.storePath, String(VMID));
    const names = await readdir(folder).catch(() => []);
    const odd = names.filter((name) => !/^(lxc-[0-9]+|state\.json|failed|\.locks)$/.test(name));
    if (odd.length > 0) throw new Error(`left behind in the store: ${odd.join(", ")}`);
    return names.filter((name) => name.startsWith("lxc-")).map((name) => `backup/${VMID}/${name}`);
  }

  async #writeJob(job: Record<string, unknown>): Promise<string> {
    const file = path.join(this.dir, `job-${this.#jobs++}.json`);
    const scfg = { content: "backup", ...this.section };
    await writeFile(
      file,
      JSON.stringify({ storeid: this.storeid, scfg, "log-dir": path.join(this.dir, "log"), ...job }),
    );
    return file;
  }

  #start(script: string, args: readonly string[], bridge = this.bundle): Program {
    return watch(startScript(script, args, { bridge, root: this.root }));
  }
}

/** One line per entry: owner, mode, mtime, link, device, xattrs and content, names as bytes in latin1. */
export async function treeOf(folder: string, leaveOut: readonly string[] = []): Promise<string[]> {
  const firstName = new Map<number, string>();
  const lines: string[] = [];
  const left = new Set(leaveOut);
  const visit = async (relative: Buffer): Promise<void> => {
    const at = Buffer.concat([Buffer.from(`${folder}/`), relative]);
    const names = (await readdir(at, { encoding: "buffer" })).sort(Buffer.compare);
    for (const name of names) {
      const inside = relative.length === 0 ? name : Buffer.concat([relative, Buffer.from("/"), name]);
      if (left.has(inside.toString("latin1"))) continue;
      const file = Buffer.concat([Buffer.from(`${folder}/`), inside]);
      const found = await lstat(file, { bigint: false });
      const label = JSON.stringify(inside.toString("latin1"));
      const mtime = Math.floor(found.mtimeMs / 1000);
      let content = "";
      if (found.isSymbolicLink()) content = await readlink(file);
      if (found.isFile())
        content = createHash("sha256")
          .update(await readFile(file))
          .digest("hex")
          .slice(0, 16);
      if (found.isFile() && found.nlink > 1) {
        content += ` = ${firstName.get(found.ino) ?? label}`;
        if (!firstName.has(found.ino)) firstName.set(found.ino, label);
      }
      lines.push(`${label} ${found.mode.toString(8)} ${found.uid}:${found.gid} ${mtime} ${found.rdev} ${content}`);
      if (found.isDirectory()) await visit(inside);
    }
  };
  await visit(Buffer.alloc(0));
  const { stdout } = await run("getfattr", ["-R", "-h", "-d", "-m", "^(user|security\\.capability)", "."], {
    cwd: folder,
  });
  return [...lines, ...stdout.split("\n").filter((line) => line !== "")];
}
