// SPDX-License-Identifier: AGPL-3.0-or-later
// Restores: what is on offer, by volume name, until PVE gives it back or this process ends.
import { RequestError } from "../core/index.ts";
import { nbdHost } from "../device/index.ts";
import type { ContainerOffer, DeviceSizes, GuestType, RestoreHooks } from "../provider/index.ts";
import type { Point } from "../store/index.ts";
import { ContainerRestore, containerMechanism } from "./container/container-restore.ts";
import { PointsInRestore } from "./points-in-restore.ts";
import { RestoreSession } from "./restore-session.ts";
import type { StorageAccess } from "./storage-access.ts";

export class DirectoryRestoreHooks implements RestoreHooks, AsyncDisposable {
  readonly #access: StorageAccess;
  readonly #restores = new Map<string, RestoreSession>();
  readonly #points = new PointsInRestore();
  readonly #containerRestores = new Map<string, ContainerRestore>();

  constructor(access: StorageAccess) {
    this.#access = access;
  }

  async restoreGetMechanism(
    volname: string,
    _signal: AbortSignal,
  ): Promise<{ mechanism: "qemu-img" | "tar" | "directory"; vmtype: GuestType }> {
    const point = await this.#point(volname);
    const mechanism = point.type === "lxc" ? containerMechanism(point) : "qemu-img";
    return { mechanism, vmtype: point.type };
  }

  async archiveGetGuestConfig(volname: string, _signal: AbortSignal): Promise<Buffer> {
    return await (await this.#point(volname)).guestConfig();
  }

  async archiveGetFirewallConfig(volname: string, _signal: AbortSignal): Promise<Buffer | undefined> {
    return await (await this.#point(volname)).firewallConfig();
  }

  async restoreVmInit(volname: string, signal: AbortSignal): Promise<DeviceSizes> {
    if (this.#restores.has(volname)) await this.restoreVmCleanup(volname); // a second init starts afresh
    const environment = {
      store: await this.#access.openStore(),
      runDir: this.#access.runDir,
      host: nbdHost(this.#access.root),
      deviceView: this.#access.config.deviceView,
      isVerified: this.#access.config.isRestoreVerified,
      warn: this.#access.warn,
    };
    const points = await this.#points.pointsOf(environment.store, volname);
    const session = await RestoreSession.open(environment, points, volname, signal);
    this.#restores.set(volname, session);
    return session.sizes;
  }

  async restoreVmCleanup(volname: string): Promise<void> {
    try {
      await this.#endRestore(volname);
    } finally {
      await this.#points.forget(volname);
    }
  }

  async restoreVmVolumeInit(volname: string, device: string, signal: AbortSignal): Promise<{ qemuImgPath: string }> {
    const session = this.#restores.get(volname);
    if (session === undefined) {
      throw new RequestError(`Cannot restore "${device}": the restore of "${volname}" was not begun`);
    }
    return { qemuImgPath: await session.offer(device, signal) };
  }

  async restoreVmVolumeCleanup(volname: string, device: string): Promise<void> {
    await this.#restores.get(volname)?.withdraw(device);
  }

  async restoreContainerInit(volname: string, signal: AbortSignal): Promise<ContainerOffer> {
    await this.#takeContainerRestore(volname)?.[Symbol.asyncDispose](); // a second init of the same backup starts afresh
    const environment = {
      store: await this.#access.openStore(),
      runDir: this.#access.runDir,
      isVerified: this.#access.config.isRestoreVerified,
      warn: this.#access.warn,
    };
    const points = await this.#points.pointsOf(environment.store, volname);
    const restore = await ContainerRestore.open(environment, points, volname, signal);
    this.#containerRestores.set(volname, restore);
    return restore.offer;
  }

  async restoreContainerCleanup(volname: string): Promise<void> {
    try {
      await this.#takeContainerRestore(volname)?.withdraw();
    } finally {
      await this.#points.forget(volname);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const volname of [...this.#restores.keys()]) await this.restoreVmCleanup(volname);
    for (const volname of [...this.#containerRestores.keys()])
      await this.#takeContainerRestore(volname)?.[Symbol.asyncDispose]();
    await this.#points[Symbol.asyncDispose]();
  }

  async #point(volname: string): Promise<Point> {
    return await this.#points.point(await this.#access.openStore(), volname);
  }

  async #endRestore(volname: string): Promise<void> {
    const session = this.#restores.get(volname);
    this.#restores.delete(volname);
    await session?.[Symbol.asyncDispose]();
  }

  #takeContainerRestore(volname: string): ContainerRestore | undefined {
    const restore = this.#containerRestores.get(volname);
    this.#containerRestores.delete(volname);
    return restore;
  }
}
