// SPDX-License-Identifier: AGPL-3.0-or-later
// The test program of the machine, and the roles it plays in other processes: `node guest.mjs [ROLE [ARGUMENT]]`.
import { atTheEnd, crashes, holdNodes } from "./crash-tests.ts";
import { contend, reservations } from "./reservation-tests.ts";
import { beforeModule, restores } from "./restore-tests.ts";
import { runTests } from "./runner.ts";

const [role, argument] = process.argv.slice(2);
if (role === "hold") await holdNodes();
else if (role === "contend") await contend(argument === "0" ? 0 : 1);
else {
  const isAlive = await runTests([...beforeModule, ...restores, ...reservations, ...crashes, ...atTheEnd]);
  process.exit(isAlive ? 0 : 1); // a test that hangs must not keep the machine up
}
