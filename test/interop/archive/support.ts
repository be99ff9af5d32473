// SPDX-License-Identifier: AGPL-3.0-or-later
// Difficult trees, archives of them, and a description of a tree that two copies can be compared by.
import { execFile, execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  closeSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { type ArchiveSummary, writeSquashfs, writeTar } from "../../../src/archive/index.ts";
import type { ArchiveJob } from "../../../src/archive/job.ts";
import { bundleInto } from "../../support/programs/bundle.ts";

export type Kind = "tar" | "squashfs";
export const KINDS = ["tar", "squashfs"] as const;
export const run = promisify(execFile);

/** A folder of this test, below /tmp and reachable by every user. */
export function makeWorkFolder(): { path: string } & Disposable {
  const path = mkdtempSync(join(tmpdir(), "pbh-archive-"));
  chmodSync(path, 0o755);
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

interface Written {
  readonly summary: ArchiveSummary;
  readonly log: string[];
}

export async function writeArchive(kind: Kind, out: string, job: Partial<ArchiveJob>): Promise<Written> {
  const log: string[] = [];
  const archiveFd = openSync(out, "wx+", 0o600);
  try {
    const summary = await (kind === "tar" ? writeTar : writeSquashfs)({
      directory: "/nonexistent",
      sources: ["./"],
      excludePatterns: [],
      compression: "none",
      bandwidthLimit: 0,
      archiveFd,
      inUserNamespace: false,
      log: (level, message) => log.push(`${level} ${message}`),
      signal: new AbortController().signal,
      ...job,
    });
    return { summary, log };
  } finally {
    closeSync(archiveFd);
  }
}

/** Unpacks with the stock tool, as root, keeping everything. */
export function unpack(kind: Kind, archive: string, to: string): void {
  if (kind === "squashfs") {
    execFileSync("unsquashfs", ["-no-progress", "-f", "-d", to, archive], { stdio: ["ignore", "ignore", "pipe"] });
    return;
  }
  mkdirSync(to);
  const flags = [
    "-p",
    "--sparse",
    "--numeric-owner",
    "--acls",
    "--xattrs",
    "--xattrs-include=*",
    "--delay-directory-restore",
  ];
  execFileSync("tar", ["-x", ...flags, "-f", archive, "-C", to], { stdio: ["ignore", "ignore", "pipe"] });
}

/** Relative names in a tree, bytes as "latin1", sorted; the root is "". Sockets are not listed. */
export function namesIn(root: string): string[] {
  return describeTree(root, { contents: false }).map((line) => line.split("\0")[0] ?? "");
}

/** One line per name: type, mode, owner, time in seconds, link target, device, link count, content. */
export function describeTree(root: string, { contents = true, ownerShift = 0 } = {}): string[] {
  const lines: string[] = [];
  const visit = (path: string, name: string): void => {
    const bytes = Buffer.from(path, "latin1");
    const stat = lstatSync(bytes);
    if (stat.isSocket()) return;
    const isFile = stat.isFile();
    lines.push(
      [
        name,
        stat.mode.toString(8),
        `${stat.uid - ownerShift}:${stat.gid - ownerShift}`,
        Math.floor(stat.mtimeMs / 1000),
        stat.isSymbolicLink() ? readlinkSync(bytes, "latin1") : "",
        stat.isCharacterDevice() || stat.isBlockDevice() ? stat.rdev : "",
        stat.isDirectory() ? "" : stat.nlink,
        isFile ? stat.size : "",
        isFile && contents ? digestOf(bytes, stat.size) : "",
      ].join("\0"),
    );
    if (!stat.isDirectory()) return;
    for (const entry of readdirSync(bytes, { encoding: "buffer" })) {
      const child = entry.toString("latin1");
      visit(`${path}/${child}`, name === "" ? child : `${name}/${child}`);
    }
  };
  visit(root, "");
  return lines.sort();
}

/** Small files whole; of huge sparse ones the last bytes, where the data is. */
function digestOf(path: Buffer, size: number): string {
  if (size > 1 << 30) return execFileSync("tail", ["-c", "4096", path.toString("utf8")]).toString("hex");
  return createHash("sha256").update(readFileSync(path)).digest("hex");
}

/** Every extended attribute below `root`, sorted; ACLs only on request (squashfs has none). */
export function attributesIn(root: string, { acls = false } = {}): string[] {
  const output = execFileSync("getfattr", ["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."], {
    cwd: root,
    encoding: "latin1",
    stdio: ["ignore", "pipe", "ignore"],
  });
  const found: string[] = [];
  let name = "";
  for (const line of output.split("\n")) {
    if (line.startsWith("# file: ")) name = line.slice(8);
    else if (line !== "" && (acls || !line.startsWith("system.posix_acl"))) found.push(`${name} ${line}`);
  }
  return found.sort();
}

/** What no simple copy gets right. Owners are `shift` and above, as an unprivileged container's are on the host. */
export function makeDifficultTree(root: string, { shift = 0, sparse = "9G" } = {}): void {
  const script = String.raw`
    set -e; cd "$0"; SHIFT="$1"; SPARSE="$2"
    mkdir -p sbin bin etc usr/bin var/log mnt/data tmp 'we ird' empty lost+found deep/a/b/c
    printf 'pve\n' > etc/hostname; printf 'secret\n' > etc/shadow; chmod 0640 etc/shadow
    head -c 300000 /dev/zero | tr '\0' 'A' > usr/bin/tool; chmod 4755 usr/bin/tool
    printf 'g' > usr/bin/setgid; chmod 2755 usr/bin/setgid; chmod 1777 tmp; : > empty/none
    ln usr/bin/tool usr/bin/tool-again; ln etc/hostname deep/a/b/c/linked
    ln -s usr/bin/tool sym; ln -s /nonexistent dangling; ln -s . loop
    mkfifo fifo; chmod 0620 fifo
    : > 'we ird/ leading space'; : > 'we ird/#hash'; : > 'we ird/*star'; : > 'we ird/[br]'; : > 'we ird/-dash'
    : > 'we ird/back\slash'; : > "we ird/new
line"; : > 'we ird/"quote'\'''
    perl -e 'open(my $f, ">", "inv\xff\xfe\x80") or die; print $f "x"; open($f, ">", "we ird/\xe4\n\xf6") or die'
    truncate -s "$SPARSE" sparse; printf 'the end' >> sparse
    printf 'hole' > holes; truncate -s 3M holes; printf 'tail' >> holes
    perl -MSocket -e 'socket(my $s, PF_UNIX, SOCK_STREAM, 0); bind($s, sockaddr_un("a.sock")) or die'
    setfattr -n user.note -v 'kept' etc/hostname; setfattr -n user.dir -v 'd' deep
    printf 'data' > mnt/data/file; : > lost+found/lost
    chown -R -h "$SHIFT:$SHIFT" .
    chown -h $((SHIFT + 33)):$((SHIFT + 44)) sym etc/shadow; chown $((SHIFT + 65534)):$((SHIFT + 65534)) tmp var/log
    chmod 4755 usr/bin/tool; chmod 2755 usr/bin/setgid
    setcap cap_net_raw+ep usr/bin/setgid
    if [ "$SHIFT" -gt 0 ]; then setcap -n "$SHIFT" cap_net_raw+ep usr/bin/setgid; fi
    setfacl -m u:$((SHIFT + 1000)):rw etc/hostname; setfacl -d -m u:$((SHIFT + 1000)):rwx deep
    touch -h -d '2001-02-03 04:05:06 UTC' sym fifo; touch -d '1999-12-31 23:59:59 UTC' etc/hostname empty deep
  `;
  mkdirSync(root, { recursive: true });
  execFileSync("bash", ["-c", script, root, String(shift), sparse], { stdio: ["ignore", "ignore", "inherit"] });
  execFileSync("mknod", [join(root, "null"), "c", "1", "3"]);
  execFileSync("mknod", [join(root, "loop0"), "b", "7", "0"]);
  execFileSync("chown", [`${shift}:${shift + 6}`, join(root, "null"), join(root, "loop0")]);
}

/** Many small names, for patterns. */
export function makeNamesTree(root: string): void {
  const files = [
    ...["a/x.log", "a/b/y.log", "a/b/.hid.log", ".log", "x.log.1", "a/foo", "a/foo1/bar", "foo/bar/baz", "a/foo bar"],
    ...[
      "tmp/one",
      "tmp/.two",
      "tmp/sub/three",
      "var/tmp/four",
      "var/tmp/.five/six",
      "var/run/app.pid",
      "var/run/s/b.pid",
    ],
    ...["var/cache/apt/archives/p.deb", "var/cache/keep", "home/u/.cache/z", "home/u/cache", "home/u/docs/[draft].txt"],
    ...["home/u/docs/draft.txt", "home/u/docs/d*.txt", "home/u/docs/back\\slash", "home/u/#hash", "home/u/ space"],
    ...[
      "lost+found/l",
      "mnt/data/lost+found/m",
      "mnt/data/x",
      "mnt/other/y",
      "opt/ab/c",
      "opt/a/b",
      "opt/a-b",
      "etc/naïve",
    ],
    ...[
      "home/u/new\nline/in",
      "home/u/newXline/in",
      "sbin/init",
      "etc/x[1]",
      "etc/x1",
      "etc/!bang",
      "etc/{a,b}",
      "..x/..y",
    ],
  ];
  for (const file of files) {
    const path = join(root, file);
    mkdirSync(path.slice(0, path.lastIndexOf("/")), { recursive: true });
    writeFileSync(path, file);
  }
}

/** Bundles a job runner into `folder`, readable by every user, as ordinary Node code. */
export async function bundleJobRunner(folder: string): Promise<string> {
  const target = join(folder, "job.mjs");
  await bundleInto(target, "test/interop/archive/in-user-namespace.ts");
  const modules = new URL("../../../node_modules", import.meta.url).pathname;
  execFileSync("ln", ["-sfn", modules, join(folder, "node_modules")]);
  return target;
}

export const HOST_SHIFT = 100_000;

/**
 * Arguments that run a command as root of a new user namespace, whose ids begin at 100000 outside, by the
 * system's newuidmap and newgidmap. They ask /etc/subuid, which a mount of our own shows only to them.
 */
export function inUserNamespace(folder: string, command: readonly string[]): [string, string[]] {
  const grants = join(folder, "subid");
  writeFileSync(grants, `root:${HOST_SHIFT}:65536\n`);
  const script = 'mount --bind "$0" /etc/subuid && mount --bind "$0" /etc/subgid && exec "$@"';
  const map = `${HOST_SHIFT},0,65536`;
  const unshare = ["unshare", "--user", `--map-users=${map}`, `--map-groups=${map}`, "--setuid", "0", "--setgid", "0"];
  return ["unshare", ["--mount", "--propagation", "private", "sh", "-c", script, grants, ...unshare, "--", ...command]];
}

/** What in-user-namespace.ts prints. */
interface MappedResult {
  readonly uid: number;
  readonly log: string[];
  readonly summary: ArchiveSummary;
  readonly error?: string;
}

/**
 * The job in a user namespace, as the container's root. The archive is opened by root outside and inherited, in a folder
 * that the container's root cannot enter.
 */
export async function archiveAsContainer(
  work: string,
  runner: string,
  kind: Kind,
  archive: string,
  directory: string,
): Promise<MappedResult> {
  const node = [process.execPath, runner, kind, "fd:9", JSON.stringify({ directory })];
  const [command, args] = inUserNamespace(work, node);
  const ended = run("sh", ["-c", 'exec 9<>"$0" && exec "$@"', archive, command, ...args]);
  const { stdout } = await ended.catch((error: unknown) => error as { stdout: string });
  return JSON.parse(stdout) as MappedResult;
}
