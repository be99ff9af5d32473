// SPDX-License-Identifier: AGPL-3.0-or-later
// A guest's part of the store at one moment: its points, and the records of the last backup, in the store and outside
// it.
import { HostError } from "../core/index.ts";
import type { CatalogEntry } from "./catalog.ts";
import type { StoreContext } from "./context.ts";
import { GuestPoints } from "./guest-points.ts";
import { type FoundState, readState } from "./state.ts";
import { Witness, type WitnessState } from "./witness.ts";

/** The records of the last backup. */
export interface Memories {
  readonly witness: WitnessState;
  readonly state: FoundState;
}

export interface GuestSnapshot extends Memories, AsyncDisposable {
  readonly points: GuestPoints;
  /** All of them, in order of names. */
  readonly entries: readonly CatalogEntry[];
}

/** Reads every point of a guest once. @throws StoreUnavailableError, EnvironmentError; the reason of `signal` */
export async function takeSnapshot(context: StoreContext, vmid: number, signal: AbortSignal): Promise<GuestSnapshot> {
  const points = await GuestPoints.open(context, vmid);
  const dispose = () => points[Symbol.asyncDispose]();
  try {
    const entries = await points.all(signal);
    return { points, entries, ...(await readMemories(context, points)), [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

export async function readMemories(context: StoreContext, points: GuestPoints): Promise<Memories> {
  const { directory } = points;
  return {
    witness: await readWitness(context, points.vmid),
    state: directory === undefined ? { kind: "none" } : await readState(directory),
  };
}

async function readWitness(context: StoreContext, vmid: number): Promise<WitnessState> {
  try {
    const witness = await Witness.locate(context.root, context.storeid, vmid, context.io);
    return await witness.read();
  } catch (error) {
    if (error instanceof HostError) return { kind: "damaged", reason: error.message };
    throw error;
  }
}
