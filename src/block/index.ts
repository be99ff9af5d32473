// SPDX-License-Identifier: AGPL-3.0-or-later
export * from "./aligned-pool.ts";
export * from "./digest.ts";
export * from "./digest-file.ts";
export * from "./extents.ts";
export * from "./native-library.ts";
export * from "./progress.ts";
export * from "./read-plan.ts";
export * from "./throttle.ts";
export * from "./zero.ts";
