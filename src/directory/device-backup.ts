// SPDX-License-Identifier: AGPL-3.0-or-later
// The backup of one disk: its image, and the digests of what the image holds.
import { randomBytes } from "node:crypto";
import { type AlignedPool, type CopyContent, type CopySource, copyDevice, type Throttle } from "../block/index.ts";
import { CleanupStack, formatBytes, type LogFunction, RequestError } from "../core/index.ts";
import { BlockDigestWriter, createClusterDigester, type Digest, SECRET_BYTES } from "../digest/index.ts";
import type { FileHandleCalls, VmVolume } from "../provider/index.ts";
import { type ClusterCompressor, type Compression, type Qcow2Chain, Qcow2Writer } from "../qcow2/index.ts";
import { FileHandleSource, NbdSource, type NbdTimeouts } from "../source/index.ts";
import {
  assertSound,
  backingFileName,
  type ChainContent,
  deviceFileName,
  digestsFileName,
  type OpenChain,
  openChainContent,
  type Point,
  type StagedDevice,
  type StagedPoint,
} from "../store/index.ts";
import { DiskContent } from "./disk-content.ts";

export interface DeviceEnvironment {
  readonly storeid: string;
  readonly compression: Compression;
  /** Started with the job; undefined for compression "none". */
  readonly compressor: ClusterCompressor | undefined;
  readonly timeouts: NbdTimeouts;
  /** Present where a Perl side can be asked about its file handles. */
  readonly fileHandles: FileHandleCalls | undefined;
  readonly log: LogFunction;
}

/** How a device is backed up now. */
export type Decision =
  | {
      readonly mode: "incremental";
      readonly base: Point;
      readonly chain: Qcow2Chain;
      readonly open: OpenChain;
      /** Why everything is read, and compared with the base; undefined: only what the bitmap calls dirty. */
      readonly readAll: string | undefined;
    }
  | { readonly mode: "full"; readonly reason: string };

interface DeviceJob {
  readonly device: string;
  readonly volume: VmVolume;
  readonly decision: Decision;
  readonly staged: StagedPoint;
  readonly pool: AlignedPool;
  readonly throttle: Throttle;
  readonly signal: AbortSignal;
}

interface DeviceBackup {
  readonly image: StagedDevice;
  /** The file of block digests; undefined where this system has no libxxhash. */
  readonly digests: { readonly name: string; readonly digest: Digest } | undefined;
}

/** @throws EnvironmentError, the errors of a source, PointDamagedError; the reason of the job's signal */
export async function backUpDevice(environment: DeviceEnvironment, job: DeviceJob): Promise<DeviceBackup> {
  const { compression, compressor, log } = environment;
  const { device, signal, staged, volume } = job;
  await using stack = new CleanupStack();
  const source = stack.use(await openSource(environment, job));
  const { decision, base } = await openBase(job, log, stack);
  const below = decision.mode === "incremental" ? decision : undefined;
  const backing: { file: string; format: "qcow2" } | undefined =
    below === undefined ? undefined : { file: backingFileName(below.base.folderName, device), format: "qcow2" };
  const file = staged.newFile(deviceFileName(device));
  const target = stack.use(
    await Qcow2Writer.create({ file, virtualBytes: volume.size, backing, compression, compressor, signal }),
  );
  const content = await openContent(base, job, log, stack);
  const copied = await copyDevice({
    ...{ device, source, target, base: below?.chain, pool: job.pool, throttle: job.throttle, log, signal },
    ...(content === undefined ? {} : { content: content.compared }),
    onStart: (totalBytes) => log("info", describe(device, volume, decision, totalBytes)),
  });
  const image = await target.finish();
  const digests = await content?.writer.finish();
  log("info", copied.summary);
  await using written = await staged.openFile(deviceFileName(device));
  await assertSound(`commit "${device}"`, written, signal); // read back
  return {
    image: {
      name: device,
      virtualBytes: volume.size,
      reason: decision.mode === "full" ? decision.reason : (decision.readAll ?? ""),
      isIncremental: below !== undefined,
      compression,
      readBytes: copied.readBytes,
      writtenBytes: image.fileBytes,
      zeroBytes: copied.zeroBytes,
      fileBytes: image.fileBytes,
      digest: image.digest,
    },
    digests: digests === undefined ? undefined : { name: digestsFileName(device), digest: digests.digest },
  };
}

interface OpenContent {
  readonly compared: CopyContent;
  readonly writer: BlockDigestWriter;
}

/** The base that is compared with. Without digests of it, everything that is read is stored: that is a full backup. */
async function openBase(
  { decision }: DeviceJob,
  log: LogFunction,
  stack: CleanupStack,
): Promise<{ readonly decision: Decision; readonly base: ChainContent | undefined }> {
  if (decision.mode === "full") return { decision, base: undefined };
  const base = await openChainContent(decision.open, (message) => log("warn", message));
  if (base !== undefined) return { decision, base: stack.use(base) };
  const { readAll } = decision;
  return { decision: readAll === undefined ? decision : { mode: "full", reason: readAll }, base };
}

/** @param stack owns what is opened. @returns undefined where this system has no libxxhash */
async function openContent(
  base: ChainContent | undefined,
  { device, staged, volume }: DeviceJob,
  log: LogFunction,
  stack: CleanupStack,
): Promise<OpenContent | undefined> {
  const secret = base?.secret ?? randomBytes(SECRET_BYTES);
  const digester = createClusterDigester(secret);
  if (digester === undefined) {
    log("warn", `${device}: no block digests: libxxhash does not load; install the package libxxhash0`);
    return undefined;
  }
  const header = { uuid: staged.uuid, diskBytes: volume.size, secret };
  const file = staged.newFile(digestsFileName(device));
  const writer = stack.use(await BlockDigestWriter.create(file, header, digester));
  return { compared: new DiskContent(digester, writer, base?.digests), writer };
}

async function openSource(
  { fileHandles: calls, log, storeid, timeouts }: DeviceEnvironment,
  { device, volume, signal }: DeviceJob,
): Promise<CopySource & AsyncDisposable> {
  const { fileHandle: handle } = volume;
  if (handle === undefined) return await NbdSource.open(device, volume, timeouts, signal);
  if (calls === undefined) throw new RequestError(`Cannot back up "${device}": its dirty regions cannot be queried`);
  return await FileHandleSource.open({ device, volume, handle, storeid, calls, timeouts, log }, signal);
}

function describe(device: string, volume: VmVolume, decision: Decision, totalBytes: number): string {
  const size = formatBytes(volume.size);
  if (decision.mode === "full") return `${device}: full backup of ${size} (${decision.reason})`;
  const { volname } = decision.base;
  return decision.readAll === undefined
    ? `${device}: incremental backup (${formatBytes(totalBytes)} of ${size} changed since "${volname}")`
    : `${device}: incremental backup since "${volname}", all of ${size} is read (${decision.readAll})`;
}
