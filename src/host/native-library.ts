// SPDX-License-Identifier: AGPL-3.0-or-later
// The system's C libraries, called through koffi: libzstd and libxxhash, because Node 20 has no zstd and its SHA-256
// costs a core, and libc, for calls that Node does not make. Every Debian has them: dpkg and apt need all of them.
import { createRequire } from "node:module";
import type Koffi from "koffi";

type NativeLibrary = ReturnType<typeof Koffi.load>;

let koffi: typeof Koffi | null | undefined;

/** The koffi module; undefined if its addon does not load. */
export function loadKoffi(): typeof Koffi | undefined {
  if (koffi === undefined) {
    try {
      koffi = createRequire(import.meta.url)("koffi") as typeof Koffi;
    } catch {
      koffi = null;
    }
  }
  return koffi ?? undefined;
}

const libraries = new Map<string, NativeLibrary | undefined>();

/** Loads `soname` ("libzstd.so.1") once; undefined if the library or koffi is missing. */
export function loadNativeLibrary(soname: string): NativeLibrary | undefined {
  if (!libraries.has(soname)) {
    let library: NativeLibrary | undefined;
    try {
      library = loadKoffi()?.load(soname);
    } catch {
      library = undefined;
    }
    libraries.set(soname, library);
  }
  return libraries.get(soname);
}
