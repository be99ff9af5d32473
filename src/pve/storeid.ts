// SPDX-License-Identifier: AGPL-3.0-or-later

/** PVE's own rule for storage ids. */
export const STOREID_PATTERN = /^[A-Za-z][A-Za-z0-9._-]{0,99}$/;
