// SPDX-License-Identifier: AGPL-3.0-or-later
import { describeProvider } from "../../support/provider/contract.ts";

describeProvider({
  name: "flat",
  entryPoint: "fixtures/flat-provider/bridge.ts",
  perlDirs: ["fixtures/flat-provider/perl"],
  scfg: { type: "flat-example" },
  supports: { incremental: false, containers: false, removal: true },
});
