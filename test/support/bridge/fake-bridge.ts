// SPDX-License-Identifier: AGPL-3.0-or-later
// The real bridge around the test double: entry of dist/test/fake-bridge.mjs.
import { runBridge } from "../../../bridge/run-bridge.ts";
import { createFakeProvider } from "./fake-provider.ts";

runBridge({ "backup-provider-dir-example": createFakeProvider });
