// SPDX-License-Identifier: AGPL-3.0-or-later
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { NbdAddress } from "../../../src/nbd/address.ts";
import { formatNbdUri, parseNbdUri } from "../../../src/nbd/uri.ts";

const SOCKET: NbdAddress = { transport: "unix", path: "/run/a b.sock" };

describe("parseNbdUri()", () => {
  it("reads a unix socket URI with percent coding", () => {
    expect(parseNbdUri("nbd+unix:///drive%2dscsi0?socket=/run/a%20b.sock")).toEqual({
      address: SOCKET,
      exportName: "drive-scsi0",
    });
  });
  it("reads host, port and export", () => {
    expect(parseNbdUri("nbd://backup.example:10810/disk")).toEqual({
      address: { transport: "tcp", host: "backup.example", port: 10810 },
      exportName: "disk",
    });
  });
  it("takes port 10809 where none is given, and the empty export where no path is", () => {
    const address = { transport: "tcp", host: "localhost", port: 10809 };
    expect(parseNbdUri("nbd://localhost")).toEqual({ address, exportName: "" });
    expect(parseNbdUri("nbd://localhost/")).toEqual({ address, exportName: "" });
  });
  it("reads an IPv6 address in brackets", () => {
    expect(parseNbdUri("nbd://[::1]:1/x").address).toEqual({ transport: "tcp", host: "::1", port: 1 });
  });
  it("keeps dots and slashes of an export name as they are", () => {
    expect(parseNbdUri("nbd://h/a/../b").exportName).toBe("a/../b");
    expect(parseNbdUri("nbd://h//x").exportName).toBe("/x");
  });
  it.each([
    ["nbds://host/x", /TLS is not supported/],
    ["nbds+unix:///x?socket=/s", /TLS is not supported/],
    ["nbd+vsock://2/x", /"nbd\+vsock" is not supported/],
    ["http://host/x", /"http" is not supported/],
    ["nbd+unix:///x?socket=/s&tls-certificates=/c", /"tls-certificates" is not supported/],
  ])("says that %s is not supported", (uri, message) => {
    expect(() => parseNbdUri(uri)).toThrow(expect.objectContaining({ code: "NOT_SUPPORTED" }));
    expect(() => parseNbdUri(uri)).toThrow(message);
  });
  it.each([
    ["", /not of the form/],
    ["/run/x.sock", /not of the form/],
    ["nbd:unix:/run/x.sock", /not of the form/],
    ["nbd://host/x#fragment", /not of the form/],
    ["nbd+unix:///x", /"socket" is missing/],
    ["nbd+unix:///x?socket=", /"socket" is missing/],
    ["nbd+unix:///x?socket=/a&socket=/b", /stands there twice/],
    ["nbd+unix://host/x?socket=/a", /has no host/],
    ["nbd://host/x?socket=/a", /belongs to nbd\+unix/],
    ["nbd:///x", /names no host/],
    ["nbd://user@host/x", /names no host/],
    ["nbd://host:port/x", /names no host/],
    ["nbd://host:0/x", /not in 1..65535/],
    ["nbd://host:65536/x", /not in 1..65535/],
    ["nbd://host/%zz", /percent coding is broken/],
    ["nbd://host/%ff", /percent coding is broken/],
    ["nbd://host/a%00b", /NUL/],
    ["nbd+unix:///x?socket=/a%00b", /NUL/],
    [`nbd://host/${"x".repeat(4097)}`, /4097 bytes, at most 4096/],
  ])("refuses %j", (uri, message) => {
    expect(() => parseNbdUri(uri)).toThrow(expect.objectContaining({ code: "INVALID_PARAMS" }));
    expect(() => parseNbdUri(uri)).toThrow(message);
  });
});

describe("formatNbdUri()", () => {
  it("codes what must not stand in a URI, and leaves slashes", () => {
    expect(formatNbdUri(SOCKET, "a?b#c%d")).toBe("nbd+unix:///a%3Fb%23c%25d?socket=/run/a%20b.sock");
  });
  it("leaves out the default port and puts IPv6 into brackets", () => {
    expect(formatNbdUri({ transport: "tcp", host: "::1", port: 10809 }, "x")).toBe("nbd://[::1]/x");
    expect(formatNbdUri({ transport: "tcp", host: "h", port: 7 }, "")).toBe("nbd://h:7/");
  });
  it("refuses a name that is no valid Unicode", () => {
    expect(() => formatNbdUri(SOCKET, "\ud800")).toThrow(/not valid Unicode/);
  });
  it("is undone by parseNbdUri() for any name and path", () => {
    const part = fc.string({ unit: "grapheme", minLength: 1, maxLength: 40 }).filter((value) => !value.includes("\0"));
    fc.assert(
      fc.property(part, part, (path, exportName) => {
        const target = { address: { transport: "unix", path } as const, exportName };
        expect(parseNbdUri(formatNbdUri(target.address, exportName))).toEqual(target);
      }),
      { seed: 7 },
    );
  });
});
