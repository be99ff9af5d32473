// SPDX-License-Identifier: AGPL-3.0-or-later
// What the operating system provides: child processes, processes and hosts by their identity, regular files,
// directories that others can write to, native libraries. It is the only module that reaches into the store, by
// descriptors. Other modules know what the files mean.
export { type ChildOptions, ChildProcess, FIRST_LENT_FD } from "./child-process.ts";
export { FILE_MODE, FOLDER_MODE, Folder, type FolderEntry } from "./folder.ts";
export { readerFlags, reopenerFlags } from "./lesser-rights.ts";
export { onLines } from "./lines.ts";
export { loadKoffi, loadNativeLibrary } from "./native-library.ts";
export {
  isRunning,
  isSameProcess,
  type ProcessIdentity,
  readBootId,
  readHostId,
  readProcess,
} from "./process-identity.ts";
export {
  type FileIdentity,
  FileProblem,
  type FileStamp,
  formatStamp,
  isSameFile,
  type NewFile,
  openAgain,
  openRegularFile,
  type RegularFile,
  readInto,
  readRegularFile,
  readStamp,
  readStampAgain,
  readWhole,
  reopen,
} from "./regular-file.ts";
export { waitForChildren } from "./wait-for-children.ts";
