#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# backup_handle_log_file, which PVE does not protect: an interruption comes out of it whatever its text is, and any
# other problem is a warning, whatever its text is.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use Test::More;
use Time::HiRes qw(ualarm);

# What the hook dies with, and the log, if Node runs $code for each message; an alarm comes after so many
# microseconds.
sub log_file {
    my ($code, $alarm, $log_line) = @_;

    my $file = BridgeTest::use_script(<<"END");
onMessage(({ id, method, params }) => {
  $code
  if (method === "initialize") return welcome(id);
  if (method === "\$/cancelRequest") return send({ id: params.id, error: { code: -32800, message: "Cancelled" } });
  reply(id, null);
});
END
    my ($provider, $log) = BridgeTest::provider();
    $provider->{log} = $log_line if $log_line;
    my $failure = BridgeTest::failure(sub {
        ualarm($alarm // 0);
        $provider->backup_handle_log_file(100, '/x');
    });
    ualarm(0);
    return ($failure, $log);
}

# As PVE does it now, and as it may do it one day.
for my $words ("interrupted by signal\n", "received interrupt\n", "stopped by the administrator\n") {
    for my $method (qw(initialize backup_handle_log_file)) {
        local $SIG{ALRM} = sub { die $words };
        my ($failure, $log) = log_file("if (method === '$method') return;", 500_000);
        is($failure, $words, "$method interrupted: " . $words =~ s/\n//r);
        is_deeply($log, [], 'which is no warning');
    }
}
{
    local $SIG{TERM} = sub { die "stopped by the administrator\n" };
    my $log_line = sub { kill('TERM', $$); return };
    my ($failure) = log_file("if (method !== 'initialize') return send({ id, error: { message: 'no' } });", 0, $log_line);
    is($failure, "stopped by the administrator\n", 'interrupted while it warns');
}

for my $case (
    ['a refusal', "if (method !== 'initialize') return send({ id, error: { message: 'no' } });", qr/no/],
    ['in the words of an interruption',
        "if (method !== 'initialize') return send({ id, error: { message: 'interrupted by signal' } });",
        qr/interrupted by signal/],
    ['at the start, too', "return send({ id, error: { message: 'received interrupt' } });", qr/received interrupt/],
    ['no object', "if (method !== 'initialize') return reply(id, [1]);", qr/Cannot use the answer .*: it is not an object/],
    ['another version', "return reply(id, { 'protocol-version': 99 });", qr/Cannot use .* it speaks protocol version 99/],
    ['no Node any more', "if (method !== 'initialize') process.exit(3);", qr/Cannot finish .*: the backup bridge is gone, it exited/],
    ['no message', 'return raw("x".repeat(9000));', qr/Cannot talk to the backup bridge: there is no header/],
) {
    my ($what, $code, $expected) = @$case;
    my ($failure, $log) = log_file($code);
    is($failure, '', "$what: it does not die");
    like($log->[0], qr/^warn: cannot keep the log file: $expected/, 'but warns');
}
for my $variable (qw(PVE_BACKUP_HOST_NODE PVE_BACKUP_HOST_BRIDGE)) {
    local $ENV{$variable} = '/nonexistent';
    my ($provider, $log) = BridgeTest::provider();
    is(BridgeTest::failure(sub { $provider->backup_handle_log_file(100, '/x') }), '', "$variable is wrong");
    like($log->[0], qr!^warn: cannot keep the log file: Cannot start [^\n]*: "/nonexistent" does not exist!, 'it warns');
}

done_testing();
