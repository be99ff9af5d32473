// SPDX-License-Identifier: AGPL-3.0-or-later
// The points of one guest, each read at its first use and remembered from then on. One job uses one of these: on a
// network share every request is a round trip.
import { CleanupStack, errnoOf, orderedMap } from "../core/index.ts";
import { type Folder, isSameFile } from "../host/index.ts";
import { type ArchiveName, parseFolderName } from "../pve/index.ts";
import { type CatalogEntry, classifyFolder, listPointFolders, openGuest } from "./catalog.ts";
import { pointFolder, type StoreContext } from "./context.ts";
import { unreadableFile } from "./image-file.ts";
import { notFound, type Point, toPoint } from "./point.ts";

const POINTS_IN_FLIGHT = 16;

export class GuestPoints implements AsyncDisposable {
  readonly vmid: number;
  readonly #context: StoreContext;
  /** Undefined for a guest without a directory. */
  readonly #guest: Folder | undefined;
  readonly #entries = new Map<string, Promise<CatalogEntry | undefined>>();
  readonly #folders = new Map<string, Promise<Folder>>();
  readonly #owned = new CleanupStack();

  private constructor(context: StoreContext, vmid: number, guest: Folder | undefined) {
    this.vmid = vmid;
    this.#context = context;
    this.#guest = guest;
    if (guest !== undefined) this.#owned.use(guest);
  }

  /** @throws PointDamagedError if something else has the name of the guest's directory; StoreUnavailableError */
  static async open(context: StoreContext, vmid: number): Promise<GuestPoints> {
    return new GuestPoints(context, vmid, await openGuest(context, vmid));
  }

  /** The guest's directory; undefined if it has none. Borrowed. */
  get directory(): Folder | undefined {
    return this.#guest;
  }

  /** For messages. */
  pathOf({ vmid, folderName }: ArchiveName): string {
    return pointFolder(this.#context, vmid, folderName);
  }

  /** Names of all directories that are named like a point, in order. @throws EnvironmentError */
  async names(): Promise<ArchiveName[]> {
    return this.#guest === undefined ? [] : await listPointFolders(this.#guest, this.vmid);
  }

  /** Reads every point. In order of names. @throws EnvironmentError; the reason of `signal` */
  async all(signal: AbortSignal): Promise<CatalogEntry[]> {
    const entries: CatalogEntry[] = [];
    for await (const entry of orderedMap(await this.names(), POINTS_IN_FLIGHT, (name) => this.entry(name))) {
      signal.throwIfAborted();
      if (entry !== undefined) entries.push(entry);
    }
    return entries;
  }

  /** What is in a directory of this name; undefined if there is none. */
  entry(name: ArchiveName): Promise<CatalogEntry | undefined> {
    const guest = this.#guest;
    if (guest === undefined) return Promise.resolve(undefined);
    return remember(this.#entries, name.folderName, () => classifyFolder(guest, name));
  }

  /** The same by the name of the directory alone. */
  async entryOf(folderName: string): Promise<CatalogEntry | undefined> {
    const name = parseFolderName(this.vmid, folderName);
    return name === undefined ? undefined : await this.entry(name);
  }

  /** @throws NotFoundError, PointDamagedError, NewerFormatError, EnvironmentError */
  async point(name: ArchiveName): Promise<Point> {
    const entry = await this.entry(name);
    if (entry === undefined) throw notFound(name);
    return await toPoint(this.#context, entry);
  }

  /** The directory of a point, open until this is disposed. @throws NotFoundError; PointDamagedError; EnvironmentError */
  folder(name: ArchiveName): Promise<Folder> {
    return remember(this.#folders, name.folderName, async () => {
      try {
        if (this.#guest !== undefined) return this.#owned.use(await this.#guest.openFolder(name.folderName));
      } catch (error) {
        if (errnoOf(error) !== "ENOENT") throw unreadableFile(this.pathOf(name), error);
      }
      throw notFound(name);
    });
  }

  /** Whether a point's directory that was opened here still has its name. Throws the system's error. */
  async isInPlace(name: ArchiveName): Promise<boolean> {
    const { identity } = await this.folder(name);
    const now = await this.#guest?.look(name.folderName);
    return now !== undefined && isSameFile(now, identity);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#owned[Symbol.asyncDispose]();
  }
}

/** A failure is not remembered. */
function remember<T>(known: Map<string, Promise<T>>, name: string, ask: () => Promise<T>): Promise<T> {
  const before = known.get(name);
  if (before !== undefined) return before;
  const answer = ask();
  known.set(name, answer);
  answer.catch(() => known.delete(name));
  return answer;
}
