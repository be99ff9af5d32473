// SPDX-License-Identifier: AGPL-3.0-or-later
// A restore asks for one backup with several calls. What the first one reads serves all of them, up to its cleanup.
import { parseArchiveName } from "../pve/index.ts";
import type { GuestPoints, Point, Store } from "../store/index.ts";

export class PointsInRestore implements AsyncDisposable {
  readonly #known = new Map<string, Promise<GuestPoints>>();

  /** Owned by this. @throws RequestError for an impossible name; StoreUnavailableError, PointDamagedError */
  async pointsOf(store: Store, volname: string): Promise<GuestPoints> {
    const known = this.#known.get(volname);
    if (known !== undefined) return await known;
    const points = store.pointsOf(parseArchiveName(volname).vmid);
    this.#known.set(volname, points);
    points.catch(() => this.#known.delete(volname));
    return await points;
  }

  /** @throws NotFoundError, PointDamagedError, NewerFormatError, EnvironmentError, and as pointsOf() */
  async point(store: Store, volname: string): Promise<Point> {
    return await (await this.pointsOf(store, volname)).point(parseArchiveName(volname));
  }

  /** The restore is over: the next one reads anew. */
  async forget(volname: string): Promise<void> {
    const points = await this.#known.get(volname)?.catch(() => undefined);
    this.#known.delete(volname);
    await points?.[Symbol.asyncDispose]();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const volname of [...this.#known.keys()]) await this.forget(volname);
  }
}
