// SPDX-License-Identifier: AGPL-3.0-or-later
// An attacker who may write to the share and knows the moment: right before one call of the product, it puts
// something else in the place of a name that the call is about to use.
import { existsSync, linkSync, lstatSync, mkdirSync, readdirSync, renameSync, type Stats, symlinkSync } from "node:fs";
import path from "node:path";
import { type NamedCall, onNamedCall } from "../fault/fault-fs.ts";
import type { HostCanaries } from "./share-host.ts";

/** What is put in the place of a name. */
export const PLANTS = [
  "link to a file",
  "link to a folder",
  "pipe",
  "empty folder",
  "folder of links",
  "hard link",
] as const;
export type Plant = (typeof PLANTS)[number];

export interface Attack {
  /** The call before which it attacks, counted from 0. */
  readonly call: number;
  /**
   * Which of the call's names: 0 is the last part of its first path, then come that path's parents, then those of its
   * second path.
   */
  readonly name: number;
  readonly plant: Plant;
  /** The number of further calls after which the original is back; undefined: it does not come back. */
  readonly backAfter: number | undefined;
}

export interface Place {
  readonly store: string;
  readonly host: HostCanaries;
  /** Where originals are kept, outside the watched directories, and a pipe to give names to. */
  readonly aside: string;
  readonly pipe: string;
}

/** Names below the store that a call uses, the last part first; none for a path outside it. */
export function namesOf(store: string, call: NamedCall): string[] {
  const names: string[] = [];
  for (const file of call.paths) {
    for (let at = file; at.startsWith(`${store}/`); at = path.dirname(at)) if (!names.includes(at)) names.push(at);
  }
  return names;
}

export class ShareAttacker {
  /** Every call below the store so far. */
  readonly calls: NamedCall[] = [];
  /** What was attacked; undefined before the attack. */
  attacked: string | undefined;
  readonly #place: Place;
  readonly #attack: Attack | undefined;
  readonly #undo: Array<() => void> = [];
  #kept = 0;

  /** @param attack none: only counts the calls */
  constructor(place: Place, attack?: Attack) {
    this.#place = place;
    this.#attack = attack;
  }

  start(): void {
    onNamedCall((call) => this.#before(call));
  }

  /** Ends the attack; `isUndone`: what is still planted is removed and the originals are back. */
  stop(isUndone: boolean): void {
    onNamedCall(undefined);
    if (isUndone) this.#putBack();
  }

  #before(call: NamedCall): void {
    const names = namesOf(this.#place.store, call);
    if (names.length === 0) return;
    const index = this.calls.push(call) - 1;
    const attack = this.#attack;
    if (attack === undefined) return;
    const name = names[attack.name % names.length];
    if (index === attack.call && name !== undefined) this.swap(name, attack.plant);
    if (attack.backAfter !== undefined && index > attack.call + attack.backAfter) this.#putBack();
  }

  /** Puts something else in the place of `name`, whether or not it exists. */
  swap(name: string, plant: Plant): void {
    if (!existsSync(path.dirname(name))) return;
    const kept = this.#setAside(name);
    this.plant(name, plant, kept);
    this.attacked ??= name;
    this.#undo.push(() => {
      if (!existsSync(path.dirname(name))) return;
      this.#setAside(name);
      if (kept !== undefined) renameSync(kept, name);
    });
  }

  /** @param original of the same name, for the names in it */
  plant(name: string, plant: Plant, original?: string): void {
    const { host, pipe } = this.#place;
    const relative = path.relative(this.#place.store, name);
    const isFolder = original !== undefined && statOf(original)?.isDirectory() === true;
    if (plant === "link to a file") symlinkSync(host.like(relative, "file"), name);
    else if (plant === "link to a folder") symlinkSync(host.like(relative, "folder"), name);
    else if (plant === "pipe") linkSync(pipe, name);
    else if (plant === "empty folder") mkdirSync(name);
    else if (plant === "hard link" && !isFolder) linkSync(host.linkable(path.basename(name)), name);
    else this.#plantFolder(name, plant, original);
  }

  /** A directory with the same names, all of which lead to canaries. */
  #plantFolder(name: string, plant: Plant, original: string | undefined): void {
    const { host, store } = this.#place;
    mkdirSync(name);
    const names = original !== undefined && statOf(original)?.isDirectory() ? readdirSync(original) : ["guest.conf"];
    for (const one of names) {
      const inside = path.join(name, one);
      const isFolder = original !== undefined && statOf(path.join(original, one))?.isDirectory() === true;
      if (plant === "hard link") {
        if (isFolder) mkdirSync(inside);
        else linkSync(host.linkable(one), inside);
      } else {
        symlinkSync(host.like(path.relative(store, inside), isFolder ? "folder" : "file"), inside);
      }
    }
  }

  #setAside(name: string): string | undefined {
    if (statOf(name) === undefined) return undefined;
    const kept = path.join(this.#place.aside, String(this.#kept++));
    renameSync(name, kept);
    return kept;
  }

  #putBack(): void {
    for (const undo of this.#undo.splice(0).reverse()) undo();
  }
}

function statOf(file: string): Stats | undefined {
  try {
    return lstatSync(file);
  } catch {
    return undefined; // the name does not exist, or what should be a directory is not one
  }
}
