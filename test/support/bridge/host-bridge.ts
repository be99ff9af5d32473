// SPDX-License-Identifier: AGPL-3.0-or-later
// The bridge of a host on which locks live and die within seconds instead of minutes.
import { runBridge } from "../../../bridge/run-bridge.ts";
import { DirectoryProvider } from "../../../src/directory/directory-provider.ts";
import { HOST_LOCK_TIMING } from "./host-timing.ts";

runBridge(
  async (context) =>
    new DirectoryProvider(context, { root: process.env.PVE_BACKUP_HOST_ROOT ?? "", lockTiming: HOST_LOCK_TIMING }),
);
