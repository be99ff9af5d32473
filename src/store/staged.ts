// SPDX-License-Identifier: AGPL-3.0-or-later
import type { FileIdentity, Folder, RegularFile } from "../host/index.ts";
import type { ArchiveName } from "../pve/index.ts";

/** A point in the making, as the commit sees it. */
export interface Staged {
  readonly uuid: string;
  readonly name: ArchiveName;
  /** Where the files are written until the commit. */
  readonly folder: Folder;
  /** Name of that directory in the guest's. */
  readonly stagingName: string;
  /** What was created so far, by name. */
  readonly files: ReadonlyMap<string, FileIdentity>;
  /** What writeFile() wrote, by name. */
  readonly written: ReadonlyMap<string, Buffer>;
  writeFile(name: string, bytes: Buffer): Promise<void>;
  openFile(name: string): Promise<RegularFile>;
}
