// SPDX-License-Identifier: AGPL-3.0-or-later
import type { Socket } from "node:net";

/** The bytes sent by the other side of a socket, read a given number at a time. */
export class SocketBytes {
  #received: Buffer = Buffer.alloc(0);
  #wake: () => void = () => undefined;
  #isEnded = false;

  constructor(socket: Socket) {
    socket.on("data", (data) => {
      this.#received = Buffer.concat([this.#received, data]);
      this.#wake();
    });
    socket.on("error", () => undefined);
    socket.on("close", () => {
      this.#isEnded = true;
      this.#wake();
    });
  }

  /** @throws HungUpError if the other side hangs up first */
  async take(length: number): Promise<Buffer> {
    while (this.#received.length < length) {
      if (this.#isEnded) throw new HungUpError("the other side hung up");
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    const taken = this.#received.subarray(0, length);
    this.#received = this.#received.subarray(length);
    return taken;
  }
}

export class HungUpError extends Error {}
