// SPDX-License-Identifier: AGPL-3.0-or-later
// One container backup, seen from the process that owns the store: the archive is made and handed over as an
// open file; when it is full it is taken back, checked and committed. No other process is given a directory.
import { basename } from "node:path";
import { type ArchiveSummary, inspectArchive } from "../../archive/index.ts";
import type { LogFunction } from "../../core/index.ts";
import {
  CancelledError,
  CleanupStack,
  EnvironmentError,
  formatBytes,
  messageOf,
  RequestError,
} from "../../core/index.ts";
import { pveRefusal } from "../../maintenance/index.ts";
import type { ContainerBackupInfo, HandleToOpen } from "../../provider/index.ts";
import {
  FIREWALL_CONFIG_FILE,
  GUEST_CONFIG_FILE,
  type GuestLock,
  type ManifestContainer,
  type Point,
  type StagedPoint,
  type Store,
} from "../../store/index.ts";
import { ContainerArchive } from "./container-archive.ts";
import { type ContainerFormat, containerArchiveName } from "./container-archiver.ts";
import { type HandoffChannel, HandoffListener, type HandoffMessage } from "./container-handoff.ts";
import { type CommitMessage, errorMessage, parseCommit } from "./container-messages.ts";

interface ContainerBackupEnvironment {
  readonly store: Store;
  readonly format: ContainerFormat;
  /** Directory for the socket, accessible to root only. */
  readonly runDir: string;
  readonly log: LogFunction;
}

/** Owned by the provider from backup_init to backup_cleanup. */
export class ContainerBackup implements AsyncDisposable {
  readonly vmid: number;
  readonly #environment: ContainerBackupEnvironment;
  readonly #lock: GuestLock;
  readonly #staged: StagedPoint;
  readonly #owned: CleanupStack;
  readonly #ending = new AbortController();
  readonly #signal: AbortSignal;
  #archive: ContainerArchive | undefined;
  #info: ContainerBackupInfo | undefined;
  #listener: HandoffListener | undefined;
  #channel: HandoffChannel | undefined;
  /** The conversation with the process in the user namespace. Never rejects. */
  #serving: Promise<void> | undefined;
  #isCommitting = false;
  #point: Point | undefined;

  private constructor(
    environment: ContainerBackupEnvironment,
    lock: GuestLock,
    staged: StagedPoint,
    owned: CleanupStack,
  ) {
    this.vmid = lock.vmid;
    this.#environment = environment;
    this.#lock = lock;
    this.#staged = staged;
    this.#owned = owned;
    this.#signal = AbortSignal.any([this.#ending.signal, lock.lost]);
  }

  /** @throws LockedError while another job backs up the guest; PointExistsError; StoreUnavailableError */
  static async begin(
    environment: ContainerBackupEnvironment,
    vmid: number,
    epoch: number,
    signal: AbortSignal,
  ): Promise<ContainerBackup> {
    await using stack = new CleanupStack();
    const lock = stack.use(await environment.store.lockGuest(vmid, signal));
    const staged = stack.use(await environment.store.beginPoint({ lock, type: "lxc", epoch, signal }));
    return new ContainerBackup(environment, lock, staged, stack.move());
  }

  get archiveName(): string {
    return this.#staged.name.archive;
  }

  /** The committed point; undefined until the data is safe. */
  get point(): Point | undefined {
    return this.#point;
  }

  /**
   * Makes the archive file and waits, in the background, for the process that will fill it.
   *
   * @throws RequestError if it was called before; EnvironmentError
   */
  async prepare(info: ContainerBackupInfo, signal: AbortSignal): Promise<readonly HandleToOpen[]> {
    if (this.#archive !== undefined)
      throw new RequestError(`Cannot prepare container ${this.vmid}: it is already prepared`);
    signal.throwIfAborted();
    const { format, log, runDir } = this.#environment;
    const archive = this.#owned.use(await ContainerArchive.create(this.#staged.newFile(containerArchiveName(format))));
    this.#archive = archive;
    this.#info = info;
    // mksquashfs opens its target again; tar only writes to what is open.
    if (format.lxcMode === "squashfs") await archive.giveTo(info.backupUserId);
    const listener = await HandoffListener.open(runDir, (message) => log("warn", message));
    this.#listener = listener;
    this.#serving = this.#serve(listener);
    return [
      { kind: "file", path: archive.handlePath },
      { kind: "socket", path: listener.path, firstLine: listener.firstLine },
    ];
  }

  /** Aborts what still runs, releases the lock, removes what was not committed. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort(new CancelledError(`Cancelled: the backup of container ${this.vmid} has ended`));
    await this.#listener?.[Symbol.asyncDispose]();
    await this.#serving;
    await this.#owned[Symbol.asyncDispose]();
  }

  async #serve(listener: HandoffListener): Promise<void> {
    const onAbort = (): void => {
      if (this.#isCommitting) return; // the commit listens itself
      this.#channel?.send(errorMessage(this.#signal.reason));
      this.#channel?.end();
    };
    try {
      this.#channel = await listener.accept(this.#signal);
      this.#signal.addEventListener("abort", onAbort, { once: true });
      this.#signal.throwIfAborted(); // the abort may have come before the listener
      const message = await this.#channel.next();
      this.#signal.throwIfAborted();
      if (message === undefined) return; // the archiver has gone; the cleanup removes the archive
      await this.#answer(this.#channel, message);
    } catch (error) {
      if (this.#channel === undefined) return; // no process connected
      // The process that broke our lock has swept our files, too.
      this.#channel.send(errorMessage(this.#signal.aborted ? error : await this.#lock.causeOf(error)));
    } finally {
      this.#signal.removeEventListener("abort", onAbort);
      this.#channel?.end();
    }
  }

  async #answer(channel: HandoffChannel, message: HandoffMessage): Promise<void> {
    const archive = this.#archive;
    if (archive === undefined) throw new RequestError(`Cannot back up container ${this.vmid}: nothing was prepared`);
    const log: LogFunction = (level, text) => channel.send({ log: [level, text] });
    await this.#commit(archive, parseCommit(message), log, this.#signal);
    channel.send({ ok: true });
  }

  /** Takes the archive back, checks it, and commits. When `point` is set the backup is safe and stays. */
  async #commit(
    archive: ContainerArchive,
    message: CommitMessage,
    log: LogFunction,
    signal: AbortSignal,
  ): Promise<void> {
    this.#isCommitting = true;
    await archive.takeBack();
    const container = await this.#inspect(archive, message.summary, log, signal);
    const digest = await archive.digest(signal);
    await this.#staged.writeFile(GUEST_CONFIG_FILE, message.guestConfig);
    const firewallConfig = this.#info?.firewallConfig;
    if (firewallConfig !== undefined) await this.#staged.writeFile(FIREWALL_CONFIG_FILE, firewallConfig);
    const digests = digest === undefined ? new Map() : new Map([[basename(archive.path), digest]]);
    const point = await this.#staged.commit({ devices: [], digests, container }, signal);
    this.#point = point;
    log("info", `backup "${point.volname}" is complete: ${formatBytes(point.occupiedBytes)} on the storage`);
    // Notes, protection and retention come next, without our lock. The backup is safe: nothing may fail it now.
    await this.#owned[Symbol.asyncDispose]().catch((error: unknown) => log("warn", messageOf(error)));
  }

  /** Reads the archive from end to end. */
  async #inspect(
    archive: ContainerArchive,
    summary: ArchiveSummary,
    log: LogFunction,
    signal: AbortSignal,
  ): Promise<ManifestContainer> {
    const { path } = archive;
    log("info", "checking the archive");
    const { hasSbin, members, totalBytes } = await inspectArchive(await archive.file(), signal);
    if (members === 0) throw new EnvironmentError(`Cannot commit "${path}": it is empty`);
    log("info", `the archive is readable: ${members} members, ${formatBytes(totalBytes)}`);
    const refusal = pveRefusal(path, { hasSbin, members });
    if (refusal !== undefined) log("warn", `Proxmox VE will refuse to restore ${basename(path)}: ${refusal}`);
    return { archive: basename(path), members, totalBytes, hasSbin, warnings: summary.warnings };
  }
}
