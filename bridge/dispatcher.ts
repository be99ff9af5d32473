// SPDX-License-Identifier: AGPL-3.0-or-later
// Runs the requests of one connection: order (initialize first), validation, the provider's life. It knows nothing of
// streams; run-bridge.ts connects it to stdio.

import type { LogFunction } from "../src/core/index.ts";
import { CancelledError, HostError, RequestError } from "../src/core/index.ts";
import type { FileHandleCalls, Provider, ProviderFactory } from "../src/provider/index.ts";
import { ProtocolError } from "./error-map.ts";
import { PROVIDER_METHODS } from "./methods.ts";
import type { WireParams } from "./params.ts";
import { assertParams, assertResult, hasValidators } from "./validate.ts";

/**
 * Incremented with every change that an older peer would not understand: to protocol.schema.json, or to what the two
 * Node processes of a container's backup say to each other. The second one starts late, perhaps after an upgrade.
 */
export const PROTOCOL_VERSION = 3;

/** Given by the composition root: which provider serves a storage type. */
export type ProviderTable = Readonly<Record<string, ProviderFactory>>;

/** The peer speaks another version of the protocol. */
class ProtocolVersionError extends HostError {
  override readonly code = "PROTOCOL_VERSION";
}

interface InitializeParams {
  readonly storeid: string;
  readonly type: string;
  readonly scfg: Readonly<Record<string, unknown>>;
  readonly nodename: string;
}

interface DispatcherOptions {
  readonly providers: ProviderTable;
  readonly log: LogFunction;
  readonly fileHandles: FileHandleCalls;
}

export class Dispatcher implements AsyncDisposable {
  readonly #options: DispatcherOptions;
  readonly #ending = new AbortController();
  readonly #running = new Set<Promise<unknown>>();
  #initialized: InitializeParams | undefined;
  #provider: Promise<Provider> | undefined;
  #disposing: Promise<void> | undefined;

  constructor(options: DispatcherOptions) {
    this.#options = options;
  }

  /**
   * Runs one request.
   *
   * @param signal aborts this request alone, with a HostError as its reason
   * @returns the result, checked against the schema
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

  /** Aborts everything that runs, waits for it, then disposes of the provider. The first call's reason counts. */
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
    // A provider that could not be created has nothing to release; the request that asked for it has failed.
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
      throw new ProtocolError("INVALID_REQUEST", "Cannot initialize the backup bridge: it is already initialized");
    }
    assertVersion(params);
    assertParams("initialize", params);
    const { storeid, type } = params as InitializeParams;
    if (!Object.hasOwn(this.#options.providers, type)) {
      throw new RequestError(`Cannot serve storage "${storeid}": there is no provider for the storage type "${type}"`);
    }
    this.#initialized = params as InitializeParams;
    return { "protocol-version": PROTOCOL_VERSION, "node-version": process.versions.node };
  }

  /** Made once, by the first method that needs it: initialize answers without evaluating the provider's code. */
  #getProvider({ storeid, type, scfg, nodename }: InitializeParams): Promise<Provider> {
    const { providers, log, fileHandles } = this.#options;
    const createProvider = providers[type] as ProviderFactory;
    this.#provider ??= createProvider({ storeid, scfg, nodename, log, fileHandles });
    return this.#provider;
  }
}

/** Comes before the schema check: another version may have another schema, even for initialize. */
function assertVersion(params: unknown): void {
  const theirs = (params as { "protocol-version"?: unknown } | null | undefined)?.["protocol-version"];
  if (theirs === PROTOCOL_VERSION) return;
  if (typeof theirs !== "number" || !Number.isInteger(theirs)) {
    throw new RequestError("Cannot initialize the backup bridge: protocol-version is missing or not an integer");
  }
  throw new ProtocolVersionError(
    `Cannot initialize the backup bridge: it speaks protocol version ${PROTOCOL_VERSION}, the Perl side ${theirs}`,
    { hint: "the package was upgraded meanwhile: start the job again, and restart a daemon that says this" },
  );
}

if (!hasValidators("initialize")) throw new Error("the compiled validators are incomplete");
