// SPDX-License-Identifier: AGPL-3.0-or-later
// An attacker who may write to the share and does not know the moment: as fast as possible, it swaps names in the
// store for other things and puts them back. Arguments: a JSON object with the directories, the pipe, a seed and the
// duration in milliseconds. Prints how many swaps there were.
import { linkSync, lstatSync, mkdirSync, readdirSync, renameSync, symlinkSync } from "node:fs";
import path from "node:path";

const { store, host, linkable, aside, pipe, seed, ms } = JSON.parse(process.argv[2] ?? "{}");

let state = seed >>> 0;
/** mulberry32 */
function draw(below) {
  state = (state + 0x6d2b79f5) >>> 0;
  let mixed = Math.imul(state ^ (state >>> 15), state | 1);
  mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
  return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
}

/** All names below the store, links not followed. */
function namesBelow(folder, found = []) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const name = path.join(folder, entry.name);
    found.push(name);
    if (entry.isDirectory()) namesBelow(name, found);
  }
  return found;
}

let kept = 0;
function keep(name) {
  const place = path.join(aside, `raid-${kept++}`);
  renameSync(name, place);
  return place;
}

/** The entry at the same place in the directory of the node, or something of its kind. */
function likeOnHost(name) {
  const known = path
    .relative(store, name)
    .replace(/\.(staging|trash)-[^/]*/, ".$1-x")
    .replace(/\.tmp-[^/]*/, ".tmp-old");
  return path.join(host, known);
}

function plant(name, isFolder) {
  const kind = draw(6);
  if (kind < 2) symlinkSync(likeOnHost(name), name);
  else if (kind === 2) symlinkSync(path.join(host, isFolder ? "100" : "100/guest.conf"), name);
  else if (kind === 3) linkSync(pipe, name);
  else if (kind === 4) mkdirSync(name);
  else linkSync(linkable, name);
}

const end = Date.now() + ms;
let swaps = 0;
while (Date.now() < end) {
  try {
    const names = namesBelow(store);
    for (let turn = 0; turn < 8 && names.length > 0; turn++) {
      const name = names[draw(names.length)];
      const isFolder = lstatSync(name).isDirectory();
      const original = keep(name);
      try {
        plant(name, isFolder);
        swaps++;
        for (let wait = draw(200_000); wait > 0; wait--); // from nothing to a few tenths of a millisecond
        keep(name);
      } finally {
        renameSync(original, name);
      }
    }
  } catch {
    // The product was quicker, or has put something there meanwhile.
  }
}
process.stdout.write(String(swaps));
