// SPDX-License-Identifier: AGPL-3.0-or-later
// Lets a test act right before the product renames, links or opens a file, as another user of the share would, and
// removes hard links, as on CIFS. There is one per process.
import fs from "node:fs";
import { syncBuiltinESMExports } from "node:module";

type TwoPaths = (from: string, to: string) => void;

const real = { rename: fs.promises.rename, link: fs.promises.link, open: fs.promises.open };
const hooks: {
  beforeRename: TwoPaths | undefined;
  beforeOpen: ((path: string) => void) | undefined;
  hasLinks: boolean;
} = { beforeRename: undefined, beforeOpen: undefined, hasLinks: true };

Object.assign(fs.promises, {
  rename: async (from: string, to: string): Promise<void> => {
    hooks.beforeRename?.(from, to);
    await real.rename(from, to);
  },
  link: async (from: string, to: string): Promise<void> => {
    if (!hooks.hasLinks)
      throw Object.assign(new Error(`EPERM: injected, link '${to}'`), { code: "EPERM", syscall: "link" });
    await real.link(from, to);
  },
  open: async (...args: Parameters<typeof real.open>): ReturnType<typeof real.open> => {
    hooks.beforeOpen?.(String(args[0]));
    return await real.open(...args);
  },
});
syncBuiltinESMExports();

/** Calls `act` once, right before the first rename that `isIt` accepts. @returns whether there was one */
export function onRename(isIt: (from: string, to: string) => boolean, act: () => void): () => boolean {
  let hasCome = false;
  hooks.beforeRename = (from, to) => {
    if (hasCome || !isIt(from, to)) return;
    hasCome = true; // `act` may rename, too
    act();
  };
  return () => hasCome;
}

/** Calls `act` once, right before the first open of a path that `isIt` accepts. @returns whether there was one */
export function onOpen(isIt: (path: string) => boolean, act: () => void): () => boolean {
  let hasCome = false;
  hooks.beforeOpen = (path) => {
    if (hasCome || !isIt(path)) return;
    hasCome = true;
    act();
  };
  return () => hasCome;
}

export function takeLinksAway(): void {
  hooks.hasLinks = false;
}

export function resetFileHooks(): void {
  hooks.beforeRename = undefined;
  hooks.beforeOpen = undefined;
  hooks.hasLinks = true;
}
