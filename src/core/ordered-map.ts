// SPDX-License-Identifier: AGPL-3.0-or-later
// The only bounded, order-keeping concurrency helper: many reads in flight, results in order.

/**
 * Runs `work` for up to `limit` items of `source` at once and yields the results in source order.
 * On a failure or an early `return()` it starts nothing more, and ends only when everything in flight
 * has settled: the caller may then release the buffers that the work wrote into.
 *
 * @throws the first failure in source order, or of `source` itself
 */
export async function* orderedMap<T, R>(
  source: AsyncIterable<T> | Iterable<T>,
  limit: number,
  work: (item: T) => Promise<R>,
): AsyncGenerator<R, void, undefined> {
  const running: Array<Promise<R>> = [];
  const iterator = Symbol.asyncIterator in source ? source[Symbol.asyncIterator]() : source[Symbol.iterator]();
  try {
    let exhausted = false;
    for (;;) {
      while (!exhausted && running.length < limit) {
        const next = await iterator.next();
        if (next.done === true) {
          exhausted = true;
        } else {
          const result = work(next.value);
          result.catch(() => undefined); // reported when its turn comes
          running.push(result);
        }
      }
      const first = running[0];
      if (first === undefined) return;
      const result = await first;
      running.shift();
      yield result;
    }
  } finally {
    await Promise.allSettled(running);
    await iterator.return?.();
  }
}
