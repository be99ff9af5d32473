// SPDX-License-Identifier: AGPL-3.0-or-later
// Several resources, released in reverse order; the first failure wins, and the rest are still released.

/** AsyncDisposableStack for Node 20. `await using stack = new CleanupStack()`. */
export class CleanupStack implements AsyncDisposable {
  readonly #actions: Array<() => Promise<void> | void> = [];

  /** Registers `action`; it runs once, when the stack is disposed. */
  defer(action: () => Promise<void> | void): void {
    this.#actions.push(action);
  }

  /** Registers a resource and returns it. */
  use<T extends AsyncDisposable>(resource: T): T {
    this.defer(async () => {
      await resource[Symbol.asyncDispose]();
    });
    return resource;
  }

  /** Gives up ownership: a later dispose of this stack releases nothing. */
  move(): CleanupStack {
    const moved = new CleanupStack();
    moved.#actions.push(...this.#actions.splice(0));
    return moved;
  }

  /** @throws the first error of an action, after every action has run. */
  async [Symbol.asyncDispose](): Promise<void> {
    let failed = false;
    let first: unknown;
    for (let action = this.#actions.pop(); action !== undefined; action = this.#actions.pop()) {
      try {
        await action();
      } catch (error) {
        if (!failed) first = error;
        failed = true;
      }
    }
    if (failed) throw first;
  }
}
