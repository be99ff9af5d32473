// SPDX-License-Identifier: AGPL-3.0-or-later
// What GNU tar says on stderr, sorted: totals, notes, warnings, and the reason of a failure.
import type { ArchiveJob } from "./job.ts";
import { Warnings } from "./warnings.ts";

export class TarMessages {
  readonly #log: ArchiveJob["log"];
  readonly #warnings: Warnings;
  #sockets = 0;
  #firstSocket = "";
  #lastError = "";
  /** Bytes of the archive before compression; known when tar has ended. */
  totalBytes: number | undefined;

  constructor(log: ArchiveJob["log"]) {
    this.#log = log;
    this.#warnings = new Warnings(log);
  }

  get warnings(): number {
    return this.#warnings.count;
  }

  /** What to say when tar failed. */
  get reason(): string {
    return this.#lastError === "" ? this.#warnings.summary : this.#lastError;
  }

  add(line: string): void {
    const text = line.replace(/^tar: /, "");
    const total = /^Total bytes written: (\d+)/.exec(text)?.[1];
    if (total !== undefined) {
      this.totalBytes = Number(total);
    } else if (text.endsWith(": socket ignored")) {
      this.#sockets++;
      if (this.#firstSocket === "") this.#firstSocket = text.slice(0, -": socket ignored".length);
    } else if (/: file is on a different filesystem; not dumped$/.test(text)) {
      this.#log("info", text);
    } else if (text.trim() !== "" && !/^Exiting with failure status due to previous errors$/.test(text)) {
      if (/: (Cannot|Write error|Read error)|error/i.test(text) && this.#lastError === "") this.#lastError = text;
      this.#warnings.add(text);
    }
  }

  close(): void {
    this.#warnings.close();
    logSockets(this.#log, this.#sockets, this.#firstSocket);
  }
}

/** Sockets mean nothing without the process that made them: no archive holds them. */
export function logSockets(log: ArchiveJob["log"], count: number, first: string | undefined): void {
  if (count > 0)
    log("info", `left out ${count} ${count === 1 ? "socket" : "sockets"}, the first is ${JSON.stringify(first)}`);
}
