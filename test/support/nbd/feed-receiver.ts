// SPDX-License-Identifier: AGPL-3.0-or-later
import type { Receiver } from "../../../src/nbd/receiver.ts";

export interface Fed<T> {
  readonly result?: T;
  readonly thrown?: unknown;
  /** The largest buffer that was asked for. */
  readonly largestBytes: number;
  /** True if the bytes ended first. */
  readonly isHungry: boolean;
}

/** Feeds a receiver until it ends, throws or the bytes do. */
export function feed<T>(receiver: Receiver<T>, input: Buffer): Fed<T> {
  let largestBytes = 0;
  try {
    let at = 0;
    for (let step = receiver.next(); ; step = receiver.next()) {
      if (step.done === true) return { result: step.value, largestBytes, isHungry: false };
      largestBytes = Math.max(largestBytes, step.value.length);
      if (at + step.value.length > input.length) return { largestBytes, isHungry: true };
      at += input.copy(step.value, 0, at, at + step.value.length);
    }
  } catch (thrown) {
    return { thrown, largestBytes, isHungry: false };
  }
}
