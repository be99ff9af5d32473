// SPDX-License-Identifier: AGPL-3.0-or-later
import { describeProvider } from "../../support/provider/contract.ts";

describeProvider({
  name: "directory",
  entryPoint: "bridge/main.ts",
  perlDirs: [],
  scfg: { "vm-backup-mode": "incremental", "dir-device-view": "fuse", "dir-compression": "none" },
  supports: { incremental: true, containers: true, removal: false },
});
