// SPDX-License-Identifier: AGPL-3.0-or-later
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    globalSetup: ["test/support/programs/build-once.ts"],
    include: ["test/**/*.test.ts"],
    exclude: ["test/bench/**"],
    // Far above what a test needs alone: it only ends what hangs.
    testTimeout: 120_000,
    hookTimeout: 180_000,
    // Two cores, real block devices: more files at once only make timeouts.
    maxWorkers: 2,
  },
});
