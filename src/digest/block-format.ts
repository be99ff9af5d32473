// SPDX-License-Identifier: AGPL-3.0-or-later
// The file of block digests beside an image: pages of 4 KiB, each with a digest of its own content. The first page is the
// header; the others hold records in guest order, one for each cluster of data and one for each run of zeroes that the
// image defines. Numbers are big-endian. docs/store-format.md describes every field.
import { FileProblem } from "../host/index.ts";
import { CLUSTER_DIGEST_BYTES, type ClusterDigester, createClusterDigester, SECRET_BYTES } from "./cluster-digest.ts";

export const PAGE_BYTES = 4096;
const BLOCK_BYTES = 64 * 1024;
const MAGIC = "PBHBLKDG";
const VERSION = 1;
/** Digest of the page | number of the page u64 | number of records u32 | flags u32 */
const PAGE_HEAD_BYTES = 32;
const RECORD_BYTES = 24;
export const RECORDS_PER_PAGE = Math.floor((PAGE_BYTES - PAGE_HEAD_BYTES) / RECORD_BYTES);
const FLAG_LAST = 1;
/** Set in a record's cluster number: the record is a run of zeroes. */
const ZERO_RUN = 0x8000_0000;
const MAX_CLUSTER = 2 ** 48;

/** Offsets in the header page, behind its head: magic 8 | version u32 | cluster bytes u32 | disk bytes u64 | uuid 16 | secret */
const AT = { magic: 32, version: 40, clusterBytes: 44, diskBytes: 48, uuid: 56, secret: 72 } as const;

/** What a file of block digests says of itself. */
export interface BlockHeader {
  /** Of the point that the file belongs to. */
  readonly uuid: string;
  readonly diskBytes: number;
  /** Shared by all points of a chain, so that their digests can be compared. */
  readonly secret: Buffer;
}

/** One record: a cluster of data with its digest, or a run of clusters of zeroes. */
export interface BlockRecord {
  readonly cluster: number;
  /** 1 for data. */
  readonly count: number;
  /** Undefined for zeroes. */
  readonly digest: Buffer | undefined;
}

export function encodeHeader({ uuid, diskBytes, secret }: BlockHeader, digester: ClusterDigester): Buffer {
  const page = Buffer.alloc(PAGE_BYTES);
  page.write(MAGIC, AT.magic, "latin1");
  page.writeUInt32BE(VERSION, AT.version);
  page.writeUInt32BE(BLOCK_BYTES, AT.clusterBytes);
  page.writeBigUInt64BE(BigInt(diskBytes), AT.diskBytes);
  Buffer.from(uuid.replaceAll("-", ""), "hex").copy(page, AT.uuid);
  secret.copy(page, AT.secret);
  sealPage(page, { number: 0, count: 0, isLast: false }, digester);
  return page;
}

interface PageHead {
  readonly number: number;
  readonly count: number;
  readonly isLast: boolean;
}

/** Fills in the head of a page whose content is complete. */
export function sealPage(page: Buffer, { number, count, isLast }: PageHead, digester: ClusterDigester): void {
  page.writeBigUInt64BE(BigInt(number), 16);
  page.writeUInt32BE(count, 24);
  page.writeUInt32BE(isLast ? FLAG_LAST : 0, 28);
  digester(page.subarray(CLUSTER_DIGEST_BYTES), page, 0);
}

/** Inverse of encodeHeader(). @throws FileProblem; undefined digester means that this system has no libxxhash */
export function decodeHeader(page: Buffer): { header: BlockHeader; digester: ClusterDigester } {
  if (page.length < PAGE_BYTES || page.toString("latin1", AT.magic, AT.version) !== MAGIC) {
    throw new FileProblem("it is not a file of block digests");
  }
  const version = page.readUInt32BE(AT.version);
  if (version !== VERSION) throw new FileProblem(`it has version ${version}, expected ${VERSION}`);
  const secret = Buffer.from(page.subarray(AT.secret, AT.secret + SECRET_BYTES));
  const digester = createClusterDigester(secret);
  if (digester === undefined) throw new FileProblem("it cannot be read: this system has no libxxhash");
  readPageHead(page, 0, digester);
  const clusterBytes = page.readUInt32BE(AT.clusterBytes);
  if (clusterBytes !== BLOCK_BYTES)
    throw new FileProblem(`it has clusters of ${clusterBytes} bytes, expected ${BLOCK_BYTES}`);
  const diskBytes = page.readBigUInt64BE(AT.diskBytes);
  if (diskBytes > BigInt(Number.MAX_SAFE_INTEGER)) throw new FileProblem("it has an impossible size of the disk");
  const hex = page.toString("hex", AT.uuid, AT.secret);
  const uuid = hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
  return { header: { uuid, diskBytes: Number(diskBytes), secret }, digester };
}

/** @throws FileProblem if the page is not the page of this number, or its content has changed */
export function readPageHead(page: Buffer, number: number, digester: ClusterDigester): PageHead {
  const actual = Buffer.alloc(CLUSTER_DIGEST_BYTES);
  digester(page.subarray(CLUSTER_DIGEST_BYTES), actual, 0);
  if (page.compare(actual, 0, CLUSTER_DIGEST_BYTES, 0, CLUSTER_DIGEST_BYTES) !== 0) {
    throw new FileProblem(`checksum mismatch in page ${number}`);
  }
  const found = page.readBigUInt64BE(16);
  const count = page.readUInt32BE(24);
  if (found !== BigInt(number) || count > RECORDS_PER_PAGE)
    throw new FileProblem(`page ${number} is not the page of this number`);
  return { number, count, isLast: (page.readUInt32BE(28) & FLAG_LAST) !== 0 };
}

const recordAt = (index: number): number => PAGE_HEAD_BYTES + index * RECORD_BYTES;

/** @param digests where the digest is, from `at` on; undefined for zeroes */
export function encodeRecord(
  page: Buffer,
  index: number,
  cluster: number,
  content: { readonly digests: Buffer; readonly at: number } | { readonly zeroes: number },
): void {
  const to = recordAt(index);
  page.writeBigUInt64BE(BigInt(cluster), to);
  if ("zeroes" in content) {
    page.writeUInt32BE((page.readUInt32BE(to) | ZERO_RUN) >>> 0, to);
    page.writeBigUInt64BE(BigInt(content.zeroes), to + 8);
    page.fill(0, to + 16, to + RECORD_BYTES);
  } else {
    content.digests.copy(page, to + 8, content.at, content.at + CLUSTER_DIGEST_BYTES);
  }
}

/** The first cluster of a record. */
export function clusterOf(page: Buffer, index: number): number {
  const at = recordAt(index);
  return (page.readUInt32BE(at) & 0x7fff_ffff) * 2 ** 32 + page.readUInt32BE(at + 4);
}

/** The digest is a view of the page. @throws FileProblem if it is impossible */
export function decodeRecord(page: Buffer, index: number): BlockRecord {
  const at = recordAt(index);
  const cluster = clusterOf(page, index);
  const isZero = (page.readUInt32BE(at) & ZERO_RUN) !== 0;
  const count = isZero ? page.readUIntBE(at + 10, 6) : 1;
  if (cluster + count > MAX_CLUSTER || count === 0) throw new FileProblem("it has an impossible record");
  return { cluster, count, digest: isZero ? undefined : page.subarray(at + 8, at + RECORD_BYTES) };
}
