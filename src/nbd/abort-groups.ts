// SPDX-License-Identifier: AGPL-3.0-or-later
// One abort listener per signal, however many commands share it: Node warns from the 11th on.

export class AbortGroups<T> {
  readonly #groups = new Map<AbortSignal, { readonly members: Set<T>; readonly listener: () => void }>();
  readonly #onAbort: (members: readonly T[], reason: unknown) => void;

  /** When a signal aborts, `onAbort` gets all its members at once. */
  constructor(onAbort: (members: readonly T[], reason: unknown) => void) {
    this.#onAbort = onAbort;
  }

  add(signal: AbortSignal, member: T): void {
    let group = this.#groups.get(signal);
    if (group === undefined) {
      const members = new Set<T>();
      group = { members, listener: () => this.#onAbort([...members], signal.reason) };
      this.#groups.set(signal, group);
      signal.addEventListener("abort", group.listener, { once: true });
    }
    group.members.add(member);
  }

  /** Removes a member; with the last one the listener is removed, too. */
  remove(signal: AbortSignal, member: T): void {
    const group = this.#groups.get(signal);
    if (group === undefined) return;
    group.members.delete(member);
    if (group.members.size > 0) return;
    signal.removeEventListener("abort", group.listener);
    this.#groups.delete(signal);
  }
}
