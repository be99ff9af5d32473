// SPDX-License-Identifier: AGPL-3.0-or-later
// Images made to hurt whoever opens them: a name each, how it differs from a sound image, and what must be said.
import { execFileSync } from "node:child_process";
import { constants, deflateRawSync } from "node:zlib";
import {
  COMPRESSED,
  COPIED,
  DATA,
  Handmade,
  type HandmadeOptions,
  L1,
  L2,
  REFCOUNT_BLOCK,
  REFCOUNT_TABLE,
} from "./handmade.ts";

/** Who refuses it first: the reader of the header, the check of the tables, the chain, or the reader of data. */
export type Stage = "header" | "check" | "chain" | "read";

interface Crafted {
  readonly name: string;
  readonly stage: Stage;
  readonly says: RegExp;
  make(): Buffer;
}

function crafted(
  name: string,
  stage: Stage,
  says: RegExp,
  edit: (image: Handmade) => unknown,
  options: HandmadeOptions = {},
): Crafted {
  const make = (): Buffer => {
    const image = new Handmade(options);
    edit(image);
    return image.bytes;
  };
  return { name, stage, says, make };
}

const GIB = 2 ** 30;
const end = /it ends at byte/;
const bomb = (kind: string): RegExp => new RegExp(`Cannot decompress a ${kind} cluster`);

let zstdStream: Buffer | undefined;
/** 1 GiB of zeroes, as the program compresses them: some kilobytes. */
function zstdBomb(): Buffer {
  zstdStream ??= execFileSync("sh", ["-c", "head -c 1073741824 /dev/zero | zstd -1 -c"], { maxBuffer: 2 ** 24 });
  return zstdStream;
}

let zlibStream: Buffer | undefined;
/** The same for zlib, which can do no better than 1 to 1032: 1 MiB. A cluster of 64 KiB holds 64 MiB of it. */
function zlibBomb(): Buffer {
  const options = { windowBits: 12, level: 9, finishFlush: constants.Z_SYNC_FLUSH };
  zlibStream ??= deflateRawSync(Buffer.alloc(64 * 2 ** 20), options);
  return Buffer.concat(Array.from({ length: 16 }, () => zlibStream as Buffer));
}

export const CRAFTED: readonly Crafted[] = [
  // Files that somebody else should open.
  ...(
    [
      ["outside the store", "../../../../etc/shadow"],
      ["with an absolute name", "/etc/shadow"],
      ["given as json:", 'json:{"driver":"file","filename":"/etc/shadow"}'],
      ["given as a URI", "nbd://127.0.0.1:10809/x"],
      ["that is itself", "drive-scsi0.qcow2"],
      ["with a name of two lines and an escape", "a\nb\u009b31m"],
    ] as const
  ).map(([what, name]) =>
    crafted(`a backing file ${what}`, "chain", /has a backing file/, (image) => image.back(name)),
  ),
  crafted("a backing file of format raw", "chain", /has a backing file/, (image) =>
    image.back("/x/qemu-1/drive-scsi0.qcow2", "raw"),
  ),
  crafted("an external data file", "header", /keeps its data in another file/, (image) => image.u64(72, 1n << 2n)),
  crafted("the name of a data file", "header", /names an external data file/, (image) =>
    image.extension(112, 0x44415441, Buffer.from("/etc/shadow")),
  ),
  crafted("raw external data", "header", /data is in another file/, (image) => image.u64(88, 1n << 1n)),
  // Features.
  crafted("extended L2 entries", "header", /extended L2 entries/, (image) => image.u64(72, 1n << 4n)),
  crafted("the corrupt bit", "header", /marked corrupt/, (image) => image.u64(72, 1n << 1n)),
  ...[5n, 17n, 63n].map((bit) =>
    crafted(`the unknown incompatible feature ${bit}`, "header", /unknown incompatible features/, (image) =>
      image.u64(72, 1n << bit),
    ),
  ),
  crafted("encryption", "header", /is encrypted \(method 1\)/, (image) => image.u32(32, 1)),
  crafted("encryption by LUKS", "header", /is encrypted \(method 2\)/, (image) =>
    image.u32(32, 2).extension(112, 0x0537be77, Buffer.alloc(16)),
  ),
  crafted("an unknown compression type", "header", /compression type is 9/, (image) => image.u64(72, 8n).u8(104, 9)),
  crafted("internal snapshots", "check", /internal snapshots or bitmaps/, (image) =>
    image.u32(60, 1).u64(64, 1n << 40n),
  ),
  crafted("a snapshot table at no cluster", "header", /snapshot table offset 513/, (image) => image.u64(64, 513n)),
  crafted("bitmaps", "check", /internal snapshots or bitmaps/, (image) =>
    image.extension(112, 0x23852875, Buffer.alloc(24)),
  ),
  // Sizes.
  ...[0, 8, 22, 31, 0xffffffff].map((bits) =>
    crafted(`${bits} cluster bits`, "header", /its cluster bits are/, (image) => image.u32(20, bits)),
  ),
  ...[1n << 63n, (1n << 64n) - 1n, 1n << 53n].map((size) =>
    crafted(`a disk of ${size} bytes`, "header", /beyond every limit/, (image) => image.u64(24, size)),
  ),
  crafted("an L1 table of 4 billion entries", "header", /L1 table has 4294967295 entries, too many/, (image) =>
    image.u32(36, 0xffffffff),
  ),
  crafted("an L1 table of 32 MiB that is not there", "check", end, (image) => image.u32(36, 4 * 2 ** 20)),
  crafted("an L1 table behind the end", "check", end, (image) => image.u64(40, 1n << 40n)),
  crafted("an L1 table at 2^63", "header", /L1 table offset .* is beyond every limit/, (image) =>
    image.u64(40, 1n << 63n),
  ),
  crafted("an L1 table too short for the disk", "header", /too few/, (image) => image.u64(24, 1n << 40n)),
  crafted("a refcount table of 4 billion clusters", "header", /refcount table has 4294967295 clusters/, (image) =>
    image.u32(56, 0xffffffff),
  ),
  crafted("a refcount table of 8 MiB that is not there", "check", end, (image) => image.u32(56, 128)),
  crafted("refcounts of 2^255 bits", "header", /refcount order is 255/, (image) => image.u32(96, 255)),
  ...[0, 103, 0xffffffff].map((length) =>
    crafted(`a header of ${length} bytes`, "header", /header length/, (image) => image.u32(100, length)),
  ),
  crafted("a header extension of 4 GiB", "header", /overruns the header/, (image) =>
    image.extension(112, 0x12345678, Buffer.alloc(0), 0xffffffff),
  ),
  crafted("an end of the extensions with a length", "header", /overruns the header/, (image) =>
    image.extension(112, 0, Buffer.alloc(0), 0xfffffff8),
  ),
  crafted("a backing name of 64 KiB", "header", /backing file name has 65536 bytes/, (image) =>
    image.back("x").u32(16, 65536),
  ),
  crafted("a backing name behind the first cluster", "header", /not in the first cluster/, (image) =>
    image.back("x").u64(8, 1n << 40n),
  ),
  crafted("a backing name with a NUL", "header", /NUL byte/, (image) => image.back("a\0b")),
  // Tables that are where they should not be.
  crafted(
    "two L1 entries to one L2 table",
    "check",
    /L2 table 1 lies in host cluster 4, which is in use already/,
    (image) => image.u64(image.at(L1) + 8n, image.at(L2) | COPIED),
    { virtualBytes: GIB },
  ),
  ...(
    [
      ["the L1 table", L1],
      ["the refcount table", REFCOUNT_TABLE],
      ["a refcount block", REFCOUNT_BLOCK],
    ] as const
  ).map(([what, cluster]) =>
    crafted(`${what} as its L2 table`, "check", /L2 table 0 lies in host cluster/, (image) =>
      image.u64(image.at(L1), image.at(cluster) | COPIED),
    ),
  ),
  crafted("an L2 table behind the end", "check", /L2 table 0 at .* is outside the file/, (image) =>
    image.u64(image.at(L1), (1n << 40n) | COPIED),
  ),
  crafted("an L2 table at no cluster", "check", /not cluster-aligned/, (image) => image.u64(image.at(L1), 0x10200n)),
  ...(
    [
      ["the L1 table", L1],
      ["the L2 table itself", L2],
      ["the refcount table", REFCOUNT_TABLE],
      ["a refcount block", REFCOUNT_BLOCK],
    ] as const
  ).map(([what, cluster]) =>
    crafted(`data in ${what}`, "check", /lies in host cluster .*, which is in use already/, (image) =>
      image.u64(image.at(L2), image.at(cluster) | COPIED),
    ),
  ),
  crafted("a compressed cluster in the header", "check", /lies in host cluster 0, which is in use already/, (image) =>
    image.u64(image.at(L2), COMPRESSED),
  ),
  crafted(
    "data of two guest clusters in one place",
    "check",
    /lies in host cluster 5, which is in use already/,
    (image) => image.u64(image.at(L2) + 8n, image.at(DATA) | COPIED),
  ),
  crafted(
    "two L2 tables that hold each other as data",
    "check",
    /which is in use already/,
    (image) =>
      image
        .grow(1, 1)
        .u64(image.at(L1) + 8n, image.at(6) | COPIED)
        .u64(image.at(L2), image.at(6) | COPIED)
        .u64(image.at(6), image.at(L2) | COPIED),
    { virtualBytes: GIB },
  ),
  crafted("data behind the end", "check", /is outside the file/, (image) =>
    image.u64(image.at(L2), (1n << 50n) | COPIED),
  ),
  crafted("data at 2^55", "check", /not below 2\^53/, (image) => image.u64(image.at(L2), (1n << 55n) | COPIED)),
  crafted("a refcount block in the header", "check", /has refcount 0|in use already/, (image) =>
    image.u64(image.at(REFCOUNT_TABLE), 0n),
  ),
  crafted("one refcount block twice", "check", /a refcount block lies in host cluster 3/, (image) =>
    image.u64(image.at(REFCOUNT_TABLE) + 8n, image.at(REFCOUNT_BLOCK)),
  ),
  crafted("a refcount block behind the end", "check", /refcount block 0 at .* is outside/, (image) =>
    image.u64(image.at(REFCOUNT_TABLE), 1n << 40n),
  ),
  crafted("every bit of every table set", "check", /reserved bits/, (image) =>
    image.bytes.fill(0xff, Number(image.at(L1)), Number(image.at(L1)) + 8),
  ),
  crafted("lost tables", "check", /^2 leaked$/, (image) => image.u64(image.at(L1), 0n)),
  crafted("a zero cluster in version 2", "check", /version 2 image has no zero clusters/, (image) =>
    image.u32(4, 2).u64(image.at(L2), image.at(DATA) | COPIED | 1n),
  ),
  // Data.
  crafted("a zlib cluster that inflates to 64 MiB", "read", bomb("zlib"), (image) => image.compress(zlibBomb())),
  crafted("a zstd cluster that inflates to 1 GiB", "read", bomb("zstd"), (image) => image.compress(zstdBomb()), {
    compressionType: 1,
  }),
  crafted(
    "a zlib cluster of 2 MiB that inflates to 1 GiB",
    "read",
    bomb("zlib"),
    (image) => image.compress(zlibBomb()),
    {
      clusterBits: 21,
      virtualBytes: 4 * 2 ** 20,
    },
  ),
  crafted("a compressed cluster that is noise", "read", bomb("zlib"), (image) =>
    image.compress(Buffer.alloc(65536, 0x5a)),
  ),
];
