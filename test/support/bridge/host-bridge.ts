// SPDX-License-Identifier: AGPL-3.0-or-later
// The bridge of a host on which locks live and die within seconds instead of minutes.
import { runBridge } from "../../../bridge/run-bridge.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { HOST_LOCK_TIMING } from "./host-timing.ts";

const root = process.env.PVE_BACKUP_HOST_ROOT ?? "";
runBridge({
  "backup-provider-dir-example": async (context) =>
    new DirectoryProvider(context, { root, lockTiming: HOST_LOCK_TIMING }),
});
