// SPDX-License-Identifier: AGPL-3.0-or-later
// The witness: a record outside the store that names the last point committed for a guest through
// one storage id. The bitmap knows what changed since *that* point, whatever the disk at the path says.
import { mkdir, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { environmentError, errnoOf, isUuid, messageOf } from "../core/index.ts";
import { FileProblem, FOLDER_MODE, Folder, readRegularFile } from "../host/index.ts";
import type { GuestIdentity } from "../pve/index.ts";
import { checkVmid, STOREID_PATTERN } from "../pve/index.ts";
import { type DurableIo, explain } from "./durable.ts";
import { checkFormat, Fields, formatJson, parseJson } from "./format/json.ts";
import { parseGuestIdentity } from "./format/manifest.ts";

export interface WitnessRecord {
  readonly storeid: string;
  readonly vmid: number;
  /** UUID of the last point whose commit is known to have ended. */
  readonly settled?: string;
  /** UUID of a point whose commit began; how it ended is unknown. */
  readonly inFlight?: string;
  readonly guest: GuestIdentity;
  /** Directories beside the points that were not complete points of ours at that commit. */
  readonly foreign: readonly string[];
}

/** What was found: nothing, a record, or a file that cannot be understood. */
export type WitnessState =
  | { readonly kind: "none" }
  | { readonly kind: "damaged"; readonly reason: string }
  | { readonly kind: "record"; readonly record: WitnessRecord };

const WITNESS_FORMAT = "pve-backup-host-witness";
const WITNESS_VERSION = 1;
const MAX_WITNESS_BYTES = 256 * 1024;
const MAX_FOREIGN = 5000;
const CLUSTER_FOLDER = "etc/pve/priv";
const LOCAL_FOLDER = "var/lib/pve-backup-host";
const CLUSTER_SUBFOLDER = "pve-backup-host";

/**
 * Where the records of a storage are. See Witness.locate().
 *
 * @throws EnvironmentError if that cannot be determined
 */
export async function witnessFolder({ root, storeid }: { root: string; storeid: string }): Promise<string> {
  const cluster = join(root || "/", CLUSTER_FOLDER);
  const isCluster = await stat(cluster).then(
    (found) => found.isDirectory(),
    (error: unknown) => {
      if (errnoOf(error) === "ENOENT") return false;
      throw environmentError("look at", cluster, error);
    },
  );
  return join(isCluster ? join(cluster, CLUSTER_SUBFOLDER) : join(root || "/", LOCAL_FOLDER), storeid);
}

/** One guest's record, opened where this host keeps it. */
export class Witness {
  readonly path: string;
  readonly #io: DurableIo;
  readonly #storeid: string;
  readonly #vmid: number;

  private constructor(path: string, storeid: string, vmid: number, io: DurableIo) {
    this.path = path;
    this.#storeid = storeid;
    this.#vmid = vmid;
    this.#io = io;
  }

  /**
   * Cluster-wide where /etc/pve/priv exists. Only whether it exists counts, not whether it can be written now: a
   * cluster without quorum must not make us fall back to an older, local record.
   *
   * @throws EnvironmentError if that cannot be determined
   */
  static async locate(root: string, storeid: string, vmid: number, io: DurableIo): Promise<Witness> {
    const folder = await witnessFolder({ root, storeid });
    return new Witness(join(folder, `${checkVmid(vmid)}.json`), storeid, vmid, io);
  }

  /** @throws EnvironmentError if the file is there and cannot be read */
  async read(): Promise<WitnessState> {
    const bytes = await this.readBytes();
    return bytes === undefined ? { kind: "none" } : this.#decode(bytes);
  }

  /** The file as it is, to put it back; undefined if there is none. */
  async readBytes(): Promise<Buffer | undefined> {
    try {
      return await readRegularFile(this.path, MAX_WITNESS_BYTES);
    } catch (error) {
      if (errnoOf(error) === "ENOENT") return undefined;
      if (error instanceof FileProblem) return Buffer.alloc(0); // not a file of ours: damaged, and replaced
      throw environmentError("read", this.path, error);
    }
  }

  async write(record: Omit<WitnessRecord, "storeid" | "vmid">): Promise<void> {
    await using folder = await this.#openFolder();
    const value = { storeid: this.#storeid, vmid: this.#vmid, ...record };
    const bytes = formatJson({ format: WITNESS_FORMAT, version: WITNESS_VERSION, ...value });
    await this.#io.replaceFile(folder, this.#name, bytes);
  }

  /** Undoes write(): `bytes` is what readBytes() gave before. */
  async restore(bytes: Buffer | undefined): Promise<void> {
    await using folder = await this.#openFolder();
    if (bytes === undefined) await folder.removeFile(this.#name);
    else await this.#io.replaceFile(folder, this.#name, bytes);
  }

  #decode(bytes: Buffer): WitnessState {
    try {
      const record = parseWitness(bytes);
      if (record.storeid !== this.#storeid || record.vmid !== this.#vmid) {
        throw new FileProblem("it belongs to another guest or storage");
      }
      return { kind: "record", record };
    } catch (error) {
      if (error instanceof FileProblem) return { kind: "damaged", reason: messageOf(error) };
      throw error;
    }
  }

  get #name(): string {
    return basename(this.path);
  }

  /** Created if it does not exist. */
  async #openFolder(): Promise<Folder> {
    const folder = dirname(this.path);
    await explain("create", folder, () => mkdir(folder, { recursive: true, mode: FOLDER_MODE }));
    return await explain("open", folder, () => Folder.open(folder));
  }
}

/** @throws FileProblem */
export function parseWitness(bytes: Buffer): WitnessRecord {
  const fields = new Fields(parseJson(bytes));
  checkFormat(fields, WITNESS_FORMAT, WITNESS_VERSION);
  const settled = fields.optionalText("settled", isUuid);
  const inFlight = fields.optionalText("inFlight", isUuid);
  const foreign = fields.list("foreign", MAX_FOREIGN).map((name) => {
    if (typeof name !== "string") throw fields.problem("foreign", "holds something that is not a name");
    return name;
  });
  return {
    storeid: fields.text("storeid", STOREID_PATTERN),
    vmid: fields.count("vmid", 999_999_999),
    ...(settled === undefined ? {} : { settled }),
    ...(inFlight === undefined ? {} : { inFlight }),
    guest: parseGuestIdentity(fields.object("guest")),
    foreign,
  };
}
