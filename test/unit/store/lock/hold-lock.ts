// SPDX-License-Identifier: AGPL-3.0-or-later
// A process that takes a lock and keeps it: arguments are path, storage root, guest id and, to read a
// point instead of writing, the archive name. Prints "held" and waits to be ended.
import { Store } from "../../../../src/store/index.ts";

const [path = "", root = "", vmid = "", archive] = process.argv.slice(2);
const signal = new AbortController().signal;
const store = await Store.open({ path, root, storeid: "bk", nodename: "child" });
if (archive === undefined) await store.lockGuest(Number(vmid), signal);
else await store.holdChains(await store.pointsOf(Number(vmid)), archive, signal);
process.stdout.write("held\n");
setInterval(() => undefined, 1000);
