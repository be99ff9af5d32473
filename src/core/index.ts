// SPDX-License-Identifier: AGPL-3.0-or-later
export * from "./bytes.ts";
export * from "./cleanup-stack.ts";
export * from "./errors.ts";
export * from "./ordered-map.ts";
