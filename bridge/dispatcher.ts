// SPDX-License-Identifier: AGPL-3.0-or-later
// Runs the requests of one connection: order (initialize first), validation, the provider's life.
// Knows no streams; run-bridge.ts connects it to stdio.

import type { LogFunction } from "../src/core/index.ts";
import { CancelledError, HostError, RequestError } from "../src/core/index.ts";
import type { BackupProvider, FileHandleCalls, ProviderContext } from "../src/provider/index.ts";
import { ProtocolError } from "./error-map.ts";
import { PROVIDER_METHODS } from "./methods.ts";
import type { WireParams } from "./params.ts";
import { assertParams, assertResult, hasValidators } from "./validate.ts";

/**
 * Raised by one with every change that an older peer would not understand: of protocol.schema.json, or of what the
 * two Node processes of a container's backup say to each other. The second one starts late, perhaps after an upgrade.
 */
export const PROTOCOL_VERSION = 2;
const PROVIDER_NAME = "Directory backup provider";

export type ProviderFactory = (context: ProviderContext) => Promise<BackupProvider>;

/** The peer speaks another version of the protocol. */
class ProtocolVersionError extends HostError {
  override readonly code = "PROTOCOL_VERSION";
}

interface InitializeParams {
  readonly storeid: string;
  readonly scfg: Readonly<Record<string, unknown>>;
  readonly apiver: number;
  readonly nodename: string;
}

interface DispatcherOptions {
  readonly createProvider: ProviderFactory;
  readonly log: LogFunction;
  readonly fileHandles: FileHandleCalls;
}

export class Dispatcher implements AsyncDisposable {
  readonly #options: DispatcherOptions;
  readonly #ending = new AbortController();
  readonly #running = new Set<Promise<unknown>>();
  #initialized: InitializeParams | undefined;
  #provider: Promise<BackupProvider> | undefined;
  #disposing: Promise<void> | undefined;

  constructor(options: DispatcherOptions) {
    this.#options = options;
  }

  /**
   * Runs one request.
   *
   * @param signal aborts this request alone, with a HostError as its reason
   * @returns the result, held against the schema
   */
  async dispatch(method: string, params: unknown, signal: AbortSignal): Promise<unknown> {
    this.#ending.signal.throwIfAborted();
    const work = this.#run(method, params, AbortSignal.any([signal, this.#ending.signal]));
    // The reply to `shutdown` waits for all that runs: it must not wait for itself.
    if (method !== "shutdown") this.#track(work);
    const result = (await work) ?? null;
    assertResult(method, result);
    return result;
  }

  /** Aborts everything that runs, waits for it, then gives up the provider. The first call's reason counts. */
  end(reason: string): Promise<void> {
    this.#disposing ??= this.#end(reason);
    return this.#disposing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end("the backup bridge is ending");
  }

  async #end(reason: string): Promise<void> {
    this.#ending.abort(new CancelledError(`Cancelled: ${reason}`));
    await Promise.allSettled(this.#running);
    // A provider that could not be made has nothing to give up; whoever asked for it was told.
    const provider = await this.#provider?.catch(() => undefined);
    await provider?.[Symbol.asyncDispose]();
  }

  #track(work: Promise<unknown>): void {
    const settled = work.catch(() => undefined).finally(() => this.#running.delete(settled));
    this.#running.add(settled);
  }

  async #run(method: string, params: unknown, signal: AbortSignal): Promise<unknown> {
    if (method === "initialize") return this.#initialize(params);
    const handler = PROVIDER_METHODS[method];
    if (method !== "shutdown" && (handler === undefined || !Object.hasOwn(PROVIDER_METHODS, method))) {
      throw new ProtocolError("METHOD_NOT_FOUND", `Cannot run "${method}": there is no such method`);
    }
    const initialized = this.#initialized;
    if (initialized === undefined) {
      throw new ProtocolError("INVALID_REQUEST", `Cannot run "${method}": initialize must come first`);
    }
    assertParams(method, params ?? {});
    if (handler === undefined) return this.end("shut down on request");
    const provider = await this.#getProvider(initialized);
    signal.throwIfAborted();
    return handler(provider, (params ?? {}) as WireParams, { storeid: initialized.storeid, signal });
  }

  #initialize(params: unknown): Record<string, unknown> {
    if (this.#initialized !== undefined) {
      throw new ProtocolError("INVALID_REQUEST", "Cannot initialize the backup bridge: it is initialized already");
    }
    assertVersion(params);
    assertParams("initialize", params);
    this.#initialized = params as InitializeParams;
    return { "protocol-version": PROTOCOL_VERSION, name: PROVIDER_NAME, "node-version": process.versions.node };
  }

  /** Made once, by the first method that needs it: initialize answers without evaluating the provider's code. */
  #getProvider({ storeid, scfg, apiver, nodename }: InitializeParams): Promise<BackupProvider> {
    const { createProvider, log, fileHandles } = this.#options;
    this.#provider ??= createProvider({ storeid, scfg, apiver, nodename, log, fileHandles });
    return this.#provider;
  }
}

/** Before the schema is asked: another version may have another schema, also for initialize. */
function assertVersion(params: unknown): void {
  const theirs = (params as { "protocol-version"?: unknown } | null | undefined)?.["protocol-version"];
  if (theirs === PROTOCOL_VERSION) return;
  if (typeof theirs !== "number" || !Number.isInteger(theirs)) {
    throw new RequestError("Cannot initialize the backup bridge: protocol-version is missing or no integer");
  }
  throw new ProtocolVersionError(
    `Cannot initialize the backup bridge: it speaks protocol version ${PROTOCOL_VERSION}, the Perl side ${theirs}`,
    { hint: "the package was upgraded meanwhile: start the job again, and restart a daemon that says this" },
  );
}

if (!hasValidators("initialize")) throw new Error("the compiled validators are incomplete");
