#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# A peer that is not the bridge, or no longer is: each kind of false answer gets one clear sentence, in bounded time.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use Test::More;
use Time::HiRes qw(time);

# What job_init dies with, if the peer runs $code.
sub result_with {
    my ($code) = @_;

    my $file = BridgeTest::use_script($code);
    my ($provider, $log) = BridgeTest::provider();
    my $begin = time();
    my $failure = BridgeTest::failure(sub { $provider->job_init(1) });
    $provider->{bridge}->close();
    cmp_ok(time() - $begin, '<', 10, 'in bounded time');
    return ($failure, $log);
}

my @lies = (
    ['another protocol version', 'onMessage(({ id }) => reply(id, { "protocol-version": 99 }));',
        qr/^Cannot use the backup bridge: it speaks protocol version 99, this process 3; the package was upgraded meanwhile: start the job again, and restart a daemon that says this$/],
    ['no protocol version', 'onMessage(({ id }) => reply(id, {}));', qr/it speaks protocol version unknown/],
    ['text instead of a header', 'raw("Hello, world\n".repeat(1000)); setInterval(() => {}, 1000);',
        qr/^Cannot talk to the backup bridge: there is no header in \d+ bytes$/],
    ['a header without a length', 'raw("Content-Type: x\r\n\r\n{}"); setInterval(() => {}, 1000);',
        qr/^Cannot talk to the backup bridge: a header has no Content-Length$/],
    ['a length beyond reason', 'raw("Content-Length: 999999999999\r\n\r\n"); setInterval(() => {}, 1000);',
        qr/^Cannot talk to the backup bridge: a message of 999999999999 bytes is too long$/],
    ['a negative length', 'raw("Content-Length: -1\r\n\r\n"); setInterval(() => {}, 1000);',
        qr/^Cannot talk to the backup bridge: a header has no Content-Length$/],
    ['no JSON', 'raw(frame("{")); setInterval(() => {}, 1000);', qr/^Cannot talk to the backup bridge: a message is not valid JSON$/],
    ['no object', 'raw(frame("[1]")); setInterval(() => {}, 1000);', qr/^Cannot talk to the backup bridge: a message is not an object$/],
    ['hang-up before the answer', 'onMessage(() => process.exit(3));',
        qr/^Cannot finish "initialize": the backup bridge is gone, it exited with status 3$/],
    ['hang-up in the middle of the answer', 'onMessage(() => { raw("Content-Length: 100\r\n\r\n{"); process.exit(0); });',
        qr/^Cannot finish "initialize": the backup bridge is gone, it exited with status 0$/],
    ['killed, with last words', 'onMessage(() => process.stderr.write("last words\n", () => process.kill(process.pid, "SIGKILL")));',
        qr/^Cannot finish "initialize": the backup bridge is gone, it was ended by SIGKILL, .*memory.* \(last words\)$/],
    ['stdout closed, still running', 'onMessage(() => { (await import("node:fs")).closeSync(1); });' =~ s/\(\) =>/async () =>/r,
        qr/^Cannot finish "initialize": the backup bridge is gone, it closed the connection$/],
    ['an error without a message', 'onMessage(({ id }) => send({ id, error: { code: 1 } }));',
        qr/^the backup bridge gave an error without a message$/],
    ['an error of several lines', 'onMessage(({ id }) => send({ id, error: { code: 1, message: "a\nb\u001b[31m", data: { hint: "c\nd" } } }));',
        qr/^a b \[31m; c d\n\z/],
);
for my $lie (@lies) {
    my ($what, $code, $expected) = @$lie;
    my ($failure) = result_with($code);
    like($failure, $expected, $what);
}

my @oddities = (
    ['one byte at a time', 'onMessage(async ({ id, method }) => {
        const result = method === "initialize" ? hello : null;
        for (const byte of frame(JSON.stringify({ id, result }))) { raw(byte); await new Promise(setImmediate); } });'],
    ['two messages in one write', 'onMessage(({ id, method }) => {
        const log = frame(JSON.stringify({ method: "log", params: { level: "info", message: "hello" } }));
        const result = method === "initialize" ? hello : null;
        raw(log + frame(JSON.stringify({ id, result }))); });'],
    ['answers to nobody, unknown notifications, further headers', 'onMessage(({ id, method }) => {
        reply(id + 100, 1); send({ method: "nonsense", params: [1] }); send({ method: "log", params: 7 });
        const text = JSON.stringify({ id, result: method === "initialize" ? hello : null });
        raw(`Content-Type: x\r\ncontent-length:${text.length}\r\n\r\n${text}`); });'],
    ['an unknown reverse request', 'onMessage(({ id, method, error }) => {
        if (method === "initialize") return welcome(id);
        if (method === "shutdown") return reply(id, null);
        if (method === "job_init") { globalThis.job = id; return send({ id: 9, method: "run_a_command", params: {} }); }
        if (error.code === -32601) reply(globalThis.job, null); });'],
    ['never reads, then answers much', 'onMessage(({ id, method }) => {
        for (let n = 0; n < 2000; n++) send({ method: "log", params: { level: "info", message: "x".repeat(1000) } });
        method === "initialize" ? welcome(id) : reply(id, null); });'],
);
for my $oddity (@oddities) {
    my ($what, $code) = @$oddity;
    is((result_with($code))[0], '', "$what: accepted");
}

{
    my (undef, $log) = result_with('onMessage(({ id, method }) => {
        for (const level of ["info", "warn", "err", "debug"]) send({ method: "log", params: { level, message: "a\nb ä" } });
        method === "initialize" ? welcome(id) : reply(id, null); });');
    is_deeply([@$log[0 .. 3]], ["info: a b \xc3\xa4", "warn: a b \xc3\xa4", "err: a b \xc3\xa4", "info: a b \xc3\xa4"],
        'log lines: known levels, one line, bytes');
}
{
    # Results that PVE would build paths from.
    my $file = BridgeTest::use_script('onMessage(({ id, method }) =>
        method === "initialize" ? welcome(id) : reply(id, {
            "archive-name": "../../etc/passwd", "qemu-img-path": "relative", mechanism: "nbd; rm", devices: { "a/b": { size: 1 } } }));');
    my ($provider) = BridgeTest::provider();
    my @calls = (
        sub { $provider->backup_init(100, 'qemu', 1) },
        sub { $provider->restore_vm_volume_init('backup/100/qemu-1', 'x', {}) },
        sub { $provider->backup_get_mechanism(100, 'qemu') },
        sub { $provider->restore_vm_init('backup/100/qemu-1') },
    );
    like(BridgeTest::failure($_), qr/^Cannot use the answer of the backup bridge: "[^"\n]+" is not a valid /, 'a wrong result')
        for @calls;
}
{
    # A share that hangs: the listing ends, and its Node ends, too.
    local $PVE::BackupProvider::Bridge::StoragePlugin::STORE_SECONDS = 1;
    my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
    my $file = BridgeTest::use_script("
        const { writeFileSync } = await import('node:fs'); writeFileSync('$dir/pid', String(process.pid));
        onMessage(({ id, method }) => { if (method === 'initialize') welcome(id); });");
    my $plugin = 'PVE::Storage::Custom::BackupProviderDirExamplePlugin';
    my $scfg = { type => $plugin->type(), path => '/nowhere', content => { backup => 1 } };
    is(BridgeTest::failure(sub { $plugin->list_volumes('bk', $scfg, undef, ['backup']) }),
        "Cannot finish \"list_volumes\": the backup bridge does not answer\n", 'a listing is bounded in time');
    my ($pid) = PVE::Tools::file_get_contents("$dir/pid") =~ m/^(\d+)$/;
    ok(!kill(0, $pid), 'and leaves no Node behind');
}
{
    local $PVE::BackupProvider::Bridge::STOP_SECONDS = 1;
    local $PVE::BackupProvider::Bridge::Process::TERM_SECONDS = 1;
    my $file = BridgeTest::use_script('process.stdin.removeAllListeners("end"); process.on("SIGTERM", () => {});
        setInterval(() => {}, 1000); onMessage(({ id, method }) => method === "initialize" ? welcome(id) : method === "job_init" && reply(id, null));');
    my ($provider) = BridgeTest::provider();
    $provider->job_init(1);
    my $pid = BridgeTest::node_pid($provider);
    $provider->{bridge}->close();
    ok(!kill(0, $pid), 'a peer that ignores everything is killed');
}

done_testing();
