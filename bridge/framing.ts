// SPDX-License-Identifier: AGPL-3.0-or-later
// JSON-RPC messages with Content-Length framing: bytes in, messages out, no input or output. As strict as the Perl
// side's Framing.pm: a message that breaks a rule here does not come from our shim.
import { ProtocolError } from "./error-map.ts";

/** Guest configs and the names of a thousand disks stay far below this. */
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
const MAX_HEADER_BYTES = 4096;
/** Lists within lists; JSON::XS has the same limit. */
const MAX_DEPTH = 512;

const HEADER_END = "\r\n\r\n";
const NOTHING = Buffer.alloc(0);

/** A message that has the shape of JSON-RPC 2.0: a request, a notification or a response. */
type RpcMessage = Readonly<Record<string, unknown>> & { readonly jsonrpc: "2.0" };

/** Cuts a stream into messages. Memory follows what has arrived, never what a header announces. */
export class FrameParser {
  /** Starts with what is not used yet: #length bytes of it count. */
  #held: Buffer = NOTHING;
  #length = 0;
  /** Of the message whose header was read. */
  #bodyBytes: number | undefined;

  /** Bytes that wait for the rest of their message. */
  get heldBytes(): number {
    return this.#length;
  }

  /**
   * Takes bytes, which are borrowed until the generator ends, and yields the messages that are complete.
   *
   * @throws ProtocolError if they are not a message; the parser must not be used again
   */
  *feed(bytes: Buffer): Generator<RpcMessage, void, undefined> {
    this.#hold(bytes);
    let at = 0;
    for (;;) {
      const waiting = this.#held.subarray(at, this.#length);
      if (this.#bodyBytes === undefined) {
        const headerBytes = waiting.indexOf(HEADER_END);
        if (headerBytes > MAX_HEADER_BYTES || (headerBytes < 0 && waiting.length > MAX_HEADER_BYTES)) {
          throw new ProtocolError("PARSE", `there is no header in ${waiting.length} bytes`);
        }
        if (headerBytes < 0) break;
        this.#bodyBytes = parseHeader(waiting.toString("latin1", 0, headerBytes));
        at += headerBytes + HEADER_END.length;
      } else {
        if (waiting.length < this.#bodyBytes) break;
        const message = parseBody(waiting.subarray(0, this.#bodyBytes));
        at += this.#bodyBytes;
        this.#bodyBytes = undefined;
        yield message;
      }
    }
    this.#release(at);
  }

  #hold(bytes: Buffer): void {
    const length = this.#length + bytes.length;
    if (length > this.#held.length) {
      const larger = Buffer.allocUnsafe(Math.max(length, Math.min(2 * this.#held.length, MAX_MESSAGE_BYTES)));
      this.#held.copy(larger, 0, 0, this.#length);
      this.#held = larger;
    }
    bytes.copy(this.#held, this.#length);
    this.#length = length;
  }

  #release(usedBytes: number): void {
    this.#held.copyWithin(0, usedBytes, this.#length);
    this.#length -= usedBytes;
    if (this.#length === 0) this.#held = NOTHING; // one large message must not occupy memory forever
  }
}

function parseHeader(header: string): number {
  let digits: string | undefined;
  for (const line of header.split("\r\n")) {
    digits = /^Content-Length:[ \t]*([0-9]{1,12})[ \t]*$/i.exec(line)?.[1] ?? digits;
  }
  if (digits === undefined) throw new ProtocolError("PARSE", "a header has no Content-Length");
  const bytes = Number(digits);
  if (bytes > MAX_MESSAGE_BYTES) throw new ProtocolError("PARSE", `a message of ${bytes} bytes is too long`);
  return bytes;
}

const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function parseBody(body: Buffer): RpcMessage {
  let message: unknown;
  try {
    const text = UTF8.decode(body);
    if (isTooDeep(text)) throw new SyntaxError("it is nested too deeply");
    message = JSON.parse(text);
  } catch {
    throw new ProtocolError("PARSE", "a message is not valid JSON");
  }
  if (!isRpcMessage(message)) throw new ProtocolError("INVALID_REQUEST", "a message is not JSON-RPC 2.0");
  return message;
}

/** Checked before the text is parsed: later code may walk through the value recursively. */
function isTooDeep(text: string): boolean {
  let depth = 0;
  let isInString = false;
  for (let at = 0; at < text.length; at++) {
    const char = text[at];
    if (isInString) {
      if (char === "\\") at++;
      else if (char === '"') isInString = false;
    } else if (char === '"') isInString = true;
    else if (char === "[" || char === "{") {
      if (++depth > MAX_DEPTH) return true;
    } else if (char === "]" || char === "}") depth--;
  }
  return false;
}

/** vscode-jsonrpc relies on all of this without checking it. */
function isRpcMessage(value: unknown): value is RpcMessage {
  if (!isObject(value) || value.jsonrpc !== "2.0") return false;
  const { id, method, params, result, error } = value;
  const hasId = isId(id);
  if (method === undefined) return (hasId || id === null) && (isObject(error) || result !== undefined);
  if (typeof method !== "string" || !(hasId || id === undefined)) return false;
  if (params !== undefined && (typeof params !== "object" || params === null)) return false;
  return method !== "$/cancelRequest" || (isObject(params) && isId(params.id));
}

function isId(value: unknown): boolean {
  return typeof value === "string" || typeof value === "number";
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
