#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# The life of the Node process: errors, interruption, forks, its end, and reverse requests.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use JSON;
use POSIX ();
use Test::More;
use Time::HiRes qw(time ualarm);

# A process may end while its file is read.
sub slurp {
    my ($file) = @_;

    open(my $fh, '<', $file) or return '';
    local $/ = undef;
    return <$fh> // '';
}

BridgeTest::use_fake_bridge();
my $access = { 'drive-scsi0' => { size => 4096, 'bitmap-mode' => 'none', 'nbd-path' => '/x' } };
my $backup = sub { my ($provider) = @_; return BridgeTest::failure(sub { $provider->backup_vm(100, 'x', $access, {}) }) };

# Errors
is($backup->(BridgeTest::provider('test-behaviour' => 'refuse')),
    "Cannot do it: refused on purpose; try something else\n", 'an error is one line: message and hint');
{
    my ($provider, $log) = BridgeTest::provider('test-behaviour' => 'bug');
    is($backup->($provider), "Internal error of the backup bridge: a bug on purpose\n", 'a bug has one line, too');
    my $pid = BridgeTest::node_pid($provider);
    like($backup->($provider), qr/a bug on purpose/, 'and does not end Node');
    is(BridgeTest::node_pid($provider), $pid, 'it is the same process');
    $provider->{bridge}->close();
    like("@$log", qr/warn: \{.*TypeError.*fake-bridge/, 'the stack is in the log');
}
like(BridgeTest::failure(sub { (BridgeTest::provider())[0]->backup_init(5, 'qemu', 1) }),
    qr/^Cannot run "backup_init": vmid is 5, which must be >= 100$/, 'what breaks the protocol is named');
like(BridgeTest::failure(sub { (BridgeTest::provider())[0]->job_init("x\ny") }),
    qr/^Cannot use the start time: "x y" is not a number$/, 'also on this side');
is(BridgeTest::failure(sub { (BridgeTest::provider('test-behaviour' => 'broken-config'))[0]->job_init(1) }),
    qq(Cannot use the storage "bk": it is broken on purpose\n), 'a provider that cannot be made');
for my $name ('../x', 'a b', "a\0b", 'x' x 300, 'a/b', '') {
    my ($provider) = BridgeTest::provider();
    my $volumes = { $name => $access->{'drive-scsi0'} };
    like(BridgeTest::failure(sub { $provider->backup_vm(100, 'x', $volumes, {}) }),
        qr/^Cannot run "backup_vm": volumes has the name "[^\n]+\n$|^Cannot run "backup_vm": volumes has the name ""/,
        'a bad device name is refused: ' . substr($name =~ s/[^ -~]/?/gr, 0, 20));
}

{
    my ($provider) = BridgeTest::provider();
    my $volname = 'backup/100/qemu-1';
    $provider->restore_vm_volume_init($volname, 'drive-scsi0', {});
    is(BridgeTest::failure(sub { $provider->restore_vm_volume_cleanup($volname, 'drive-scsi0', {}) }), '',
        'a disk is taken back by the Node that offered it');
    $provider->restore_vm_volume_init($volname, 'drive-scsi0', {});
    $provider->{bridge}->close();
    is(BridgeTest::failure(sub { $provider->restore_vm_volume_cleanup($volname, 'drive-scsi0', {}) }),
        "Cannot verify the restored \"drive-scsi0\": the backup bridge that offered it ended meanwhile;"
            . " restore again\n",
        'and not by another one, which knows nothing of it');
}

for my $case (
    ['', 'tar-path', ''],
    ['squashfs', 'archive-directory',
        "Cannot verify the restored \"backup/101/lxc-1\": the backup bridge that offered it ended meanwhile;"
            . " restore again\n"],
) {
    my ($behaviour, $key, $expected) = @$case;
    my ($provider) = BridgeTest::provider('test-behaviour' => $behaviour);
    my @of_container = ('backup/101/lxc-1', 'bk', {});
    my $cleanup = sub { BridgeTest::failure(sub { $provider->restore_container_cleanup(@of_container) }) };
    is_deeply([keys %{ $provider->restore_container_init(@of_container) }], [$key], "a container as $key");
    is($cleanup->(), '', 'is taken back by the Node that offered it');
    $provider->restore_container_init(@of_container);
    $provider->{bridge}->close();
    is($cleanup->(), $expected, 'by another one: a plain file is whole, what was served may not be');
}

# Node itself
for my $case (
    [PVE_BACKUP_HOST_NODE => '/nonexistent/node',
        qr!^Cannot start Node\.js: "/nonexistent/node" does not exist; install the package nodejs \(20\.19 or newer\)$!],
    [PVE_BACKUP_HOST_BRIDGE => '/nonexistent/bridge.mjs', qr!^Cannot start the backup bridge: "/nonexistent/bridge\.mjs" does not exist;!],
    [PVE_BACKUP_HOST_NODE => '/bin/no de;', qr!^Cannot start Node\.js: PVE_BACKUP_HOST_NODE is "/bin/no de;", expected a plain!],
    [PVE_BACKUP_HOST_NODE => '/usr', qr!^Cannot start Node\.js: /usr: Permission denied$!],
    [PVE_BACKUP_HOST_NODE => '/bin/false', qr!^Cannot finish "initialize": the backup bridge is gone, it exited with status 1$!],
) {
    my ($name, $value, $expected) = @$case;
    local $ENV{$name} = $value;
    like(BridgeTest::failure(sub { (BridgeTest::provider())[0]->job_init(1) }), $expected, "$name=$value");
}
{
    my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
    PVE::Tools::file_set_contents("$dir/node", qq(#!/bin/sh\ntest "\$1" = --version && echo v18.19.1\nexit 1\n));
    chmod(0755, "$dir/node");
    local $ENV{PVE_BACKUP_HOST_NODE} = "$dir/node";
    is(BridgeTest::failure(sub { (BridgeTest::provider())[0]->job_init(1) }),
        "Cannot start the backup bridge: Node.js is 18.19.1, expected 20.19 or newer\n", 'Node too old');
}
{
    local $ENV{NODE_OPTIONS} = '--no-such-option';
    is(BridgeTest::failure(sub { (BridgeTest::provider())[0]->job_init(1) }), '', 'NODE_OPTIONS changes nothing');
}
{
    my ($provider, $log) = BridgeTest::provider('test-behaviour' => 'stderr');
    is($backup->($provider), '', 'writing to stderr is no failure');
    $provider->{bridge}->close();
    is_deeply([grep { m/line/ } @$log], ['warn: first line', 'warn: second line'], 'its lines are warnings');
}
{
    my ($provider) = BridgeTest::provider('test-behaviour' => 'crash');
    is($backup->($provider),
        "Cannot finish \"backup_vm\": the backup bridge is gone, it exited with status 7\n", 'Node gone in a call');
    is_deeply($provider->backup_cleanup(100, 'qemu', 0, { error => 'x' })->{stats}, { 'archive-size' => 12345678901 },
        'the cleanup that follows gets a new Node');
}
{
    my ($provider, $log) = BridgeTest::provider();
    my $big = join('', map { chr($_ % 256) } 1 .. 3_000_000);
    $provider->backup_vm(100, $big, $access, {});
    is(length($log->[0] =~ s/^info: backup_vm ([0-9a-f]+) .*/$1/r), 6_000_000, 'big messages pass in both directions');
}

# Interruption
for my $behaviour (qw(hang hang-deaf)) {
    local $PVE::BackupProvider::Bridge::CANCEL_SECONDS = 1;
    my ($provider, $log) = BridgeTest::provider('test-behaviour' => $behaviour);
    $provider->job_init(1);
    my $pid = BridgeTest::node_pid($provider);
    local $SIG{TERM} = sub { die "interrupted by signal\n" };
    local $SIG{ALRM} = sub { kill('TERM', $$) };
    ualarm(300_000);
    my $begin = time();
    is($backup->($provider), "interrupted by signal\n", "$behaviour: a signal in a call: its own words come out");
    if ($behaviour eq 'hang') {
        cmp_ok(time() - $begin, '<', 3, 'at once');
        is(BridgeTest::node_pid($provider), $pid, 'Node answered the cancellation and lives');
    }
    is($provider->backup_get_mechanism(100, 'qemu'), 'nbd', 'later calls work');
}

{
    my ($provider) = BridgeTest::provider();
    $provider->job_init(1);
    my $pid = BridgeTest::node_pid($provider);
    my $next_message = \&PVE::BackupProvider::Bridge::Framing::next_message;
    my $count = 0;
    no warnings 'redefine';
    local *PVE::BackupProvider::Bridge::Framing::next_message = sub {
        kill('TERM', $$) if !$count++;
        return $next_message->(@_);
    };
    local $SIG{TERM} = sub { die "interrupted by signal\n" };
    my $begin = time();
    is(BridgeTest::failure(sub { $provider->backup_get_mechanism(100, 'qemu') }), "interrupted by signal\n",
        'a signal while a message is read is not taken for a bad message');
    cmp_ok(time() - $begin, '<', 10, 'the message is not lost: nobody waits for it');
    is($provider->backup_get_mechanism(100, 'qemu'), 'nbd', 'later calls work');
    is(BridgeTest::node_pid($provider), $pid, 'with the same Node');
}

# Forks
{
    my ($provider) = BridgeTest::provider();
    $provider->job_init(1);
    my $pid = BridgeTest::node_pid($provider);
    pipe(my $read, my $write);
    my $child = fork();
    if ($child == 0) {
        $provider->backup_get_mechanism(100, 'qemu');
        syswrite($write, BridgeTest::node_pid($provider));
        undef($provider); # its DESTROY ends only the child's own Node
        POSIX::_exit(0);
    }
    close($write);
    sysread($read, my $other, 100);
    waitpid($child, 0);
    is($?, 0, 'a forked child can call');
    ok($other && $other != $pid, 'with a Node of its own');
    ok(BridgeTest::ends_within(($other =~ m/^(\d+)$/)[0], 5), 'which has ended with the child');
    ok(kill(0, $pid), "the parent's Node lives");
    is($provider->backup_get_mechanism(100, 'lxc'), 'directory', 'and answers');
    my $silent = fork();
    if ($silent == 0) { undef($provider); POSIX::_exit(0) }
    waitpid($silent, 0);
    is($provider->backup_get_mechanism(100, 'lxc'), 'directory', 'a child that only goes leaves it alone');
}
{
    my ($provider) = BridgeTest::provider();
    my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
    my $info = { directory => $dir, sources => ['./'], 'backup-user-id' => 100000 };
    $provider->backup_container_prepare(100, $info);
    my $in_child = fork();
    if ($in_child == 0) {
        my @result = $provider->backup_container(100, "hostname: x\n", ['/tmp/?*'], $info);
        my $left = grep { m/PPid:\s+$$\b/ } map { slurp($_) } glob('/proc/[0-9]*/status');
        POSIX::_exit(@result + $left);
    }
    waitpid($in_child, 0);
    is($?, 0, 'backup_container in a child returns nothing and leaves no Node behind');
}

# The parent is killed: Node ends, although a forked child keeps its input open
{
    pipe(my $read, my $write);
    my $parent = fork();
    if ($parent == 0) {
        my ($provider) = BridgeTest::provider();
        $provider->job_init(1);
        my $holder = fork();
        if ($holder == 0) { sleep(60); POSIX::_exit(0) }
        syswrite($write, BridgeTest::node_pid($provider) . " $holder");
        sleep(60);
        POSIX::_exit(0);
    }
    close($write);
    sysread($read, my $pids, 100);
    my ($node, $holder) = $pids =~ m/^(\d+) (\d+)$/;
    kill('KILL', $parent);
    waitpid($parent, 0);
    ok(BridgeTest::ends_within($node, 5), 'Node ends when its parent was killed');
    kill('KILL', $holder);
}

# What PVE's programs may have set up
{
    local ($?, $!, $@) = (42 << 8, 5, 'kept');
    my $sigchld = 0;
    local $SIG{CHLD} = sub { 1 while waitpid(-1, POSIX::WNOHANG()) > 0; $sigchld++ };
    {
        my ($provider) = BridgeTest::provider();
        eval { $provider->job_init(1) };
        ($?, $!, $@) = (42 << 8, 5, 'kept');
    }
    is_deeply([$? >> 8, $! + 0, $@], [42, 5, 'kept'], 'the end of an object changes no status and no error');
    ok($sigchld, 'also where a handler reaps every child first');
}
{
    local $SIG{CHLD} = 'IGNORE';
    is(BridgeTest::failure(sub { (BridgeTest::provider())[0]->job_init(1) }), '', 'and where children are not waited for');
}

# Another process asks Node to end: Node cleans up, and the end of the program must not hurry it.
{
    local $ENV{PVE_BACKUP_HOST_BRIDGE} = $ENV{PVE_BACKUP_HOST_BRIDGE};
    my $done = File::Temp::tempdir(CLEANUP => 1) . '/done';
    my $script = BridgeTest::use_script(<<"END");
import { writeFileSync } from "node:fs";
onMessage(({ id, method }) => {
  if (method === "initialize") return welcome(id);
  send({ id, error: { code: -32800, message: "Cancelled: the backup bridge got SIGTERM" } });
  if (method === "shutdown") setTimeout(() => { writeFileSync("$done", ""); process.exit(143); }, 300);
});
process.stdin.removeAllListeners("end");
END
    my ($provider) = BridgeTest::provider();
    is(BridgeTest::failure(sub { $provider->job_init(1) }), "Cancelled: the backup bridge got SIGTERM\n", 'Node ends');
    undef($provider);
    ok(-e $done, 'and has the time to clean up');
}

# File handles
{
    my $file = File::Temp->new();
    print $file 'x' x (1024 * 1024);
    $file->flush();
    my @regions = ([0, 65536], [131072, 65536], [524288, 65536]);
    my $volumes = {
        'drive-scsi0' => {
            size => 1048576, 'bitmap-mode' => 'reuse', 'bitmap-name' => 'b', 'file-handle' => $file,
            'next-dirty-region' => sub { return @{ shift(@regions) // [] } },
        },
    };
    my ($provider, $log) = BridgeTest::provider('test-behaviour' => 'file-handle');
    my $before = (stat($file))[12];
    $provider->backup_vm(100, 'x', $volumes, {});
    is_deeply([grep { m/^info: drive/ } @$log],
        ['info: drive-scsi0: 0+65536 131072+65536', 'info: drive-scsi0: 524288+65536 done'], 'dirty regions in batches');
    is($before - (stat($file))[12], 3 * 65536 / 512, 'the regions were given up');
    $volumes->{'drive-scsi0'}->{'next-dirty-region'} = sub { die "nbdinfo failed\n" };
    is(BridgeTest::failure(sub { $provider->backup_vm(100, 'x', $volumes, {}) }), "nbdinfo failed\n",
        'what the closure dies with comes out');
    like($backup->($provider), qr/has no next-dirty-region/, 'a device without one is named');
}

done_testing();
