// SPDX-License-Identifier: AGPL-3.0-or-later
// What the hooks of the directory provider share: the storage's section, the opened store, places on the node.
import path from "node:path";
import type { ProviderContext } from "../provider/index.ts";
import type { NbdTimeouts } from "../source/index.ts";
import { type LockTiming, Store } from "../store/index.ts";
import { type DirectoryConfig, parseConfig } from "./config.ts";

export interface DirectoryProviderOptions {
  /** Prefix before /etc/pve, /run and /var/lib, for tests beside a real system. */
  readonly root?: string;
  /** In place of the storage's dir-nbd-timeout. */
  readonly timeouts?: NbdTimeouts;
  /** For tests: how often locks are refreshed, and how long a dead host's locks are respected. */
  readonly lockTiming?: LockTiming;
}

export class StorageAccess implements AsyncDisposable {
  readonly context: ProviderContext;
  readonly config: DirectoryConfig;
  readonly root: string;
  readonly timeouts: NbdTimeouts;
  readonly #lockTiming: LockTiming | undefined;
  #store: Promise<Store> | undefined;

  /** @throws RequestError if the storage's section has an unknown option or value */
  constructor(context: ProviderContext, options: DirectoryProviderOptions) {
    this.context = context;
    this.config = parseConfig(context.scfg);
    this.root = options.root ?? "";
    this.#lockTiming = options.lockTiming;
    const waitMs = this.config.nbdTimeoutSeconds * 1000;
    this.timeouts = options.timeouts ?? { connectTimeoutMs: waitMs, replyTimeoutMs: waitMs };
  }

  readonly warn = (message: string): void => this.context.log("warn", message);

  /** For mounts and sockets of this process, on the node itself. */
  get runDir(): string {
    return path.join(this.root || "/", "run/pve-backup-host");
  }

  /** Opened once, by the first hook that needs it. @throws StoreUnavailableError */
  openStore(): Promise<Store> {
    this.#store ??= Store.open({
      path: this.config.path,
      storeid: this.context.storeid,
      root: this.root,
      nodename: this.context.nodename,
      warn: this.warn,
      ...(this.#lockTiming === undefined ? {} : { timing: this.#lockTiming }),
    }).catch((error: unknown) => {
      this.#store = undefined; // the share may be back at the next call
      throw error;
    });
    return this.#store;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const store = await this.#store?.catch(() => undefined);
    this.#store = undefined;
    await store?.[Symbol.asyncDispose]();
  }
}
