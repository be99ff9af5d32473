// SPDX-License-Identifier: AGPL-3.0-or-later
// A process that holds a raw view until it is killed: `node hold-raw-view.mjs CHAIN_FILE SIZE RUN_DIR MECHANISM`.

import { openRawView, type RawViewMechanism } from "../../../src/device/index.ts";
import { openRegularFile } from "../../../src/host/index.ts";

const [image = "", size = "", runDir = "", mechanism = ""] = process.argv.slice(2);
const view = await openRawView({
  chain: [await openRegularFile(image)],
  sizeBytes: Number(size),
  runDir,
  name: "drive-scsi0",
  mechanism: mechanism as RawViewMechanism,
  signal: new AbortController().signal,
});
process.stdout.write(`${view.path}\n`);
setInterval(() => undefined, 1_000);
