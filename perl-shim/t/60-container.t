#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# The two hooks of a container's backup: which handles are passed on, through a fork and without one, and what PVE
# gets to see.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use JSON;
use POSIX ();
use Test::More;

BridgeTest::use_fake_bridge();
my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
my $count = 0;

# A provider and the info of a container whose archive the test double makes in a separate directory.
sub container {
    my (%section) = @_;

    my $own = "$dir/" . ++$count;
    mkdir($own) or die "$own: $!";
    my ($provider, $log) = BridgeTest::provider(%section);
    my $info = { directory => $own, sources => ['./', './mnt/x'], 'backup-user-id' => 100000 };
    return ($provider, $info, $log, "$own/archive.tar");
}

# What PVE does with the hook in a forked child: its log, and its answer as JSON.
sub in_child {
    my ($code, $log) = @_;

    pipe(my $read, my $write) or die;
    my $pid = fork() // die;
    if ($pid == 0) {
        my $answer = eval { encode_json({ result => scalar($code->()) }) };
        $answer = encode_json({ error => ref($@) ? 'an object' : $@ }) if !defined($answer);
        syswrite($write, $answer . "\n" . encode_json($log));
        POSIX::_exit(0);
    }
    close($write);
    my ($answer, $lines) = map { decode_json($_) } <$read>;
    waitpid($pid, 0);
    return ($answer, $lines);
}

sub handles_on {
    my ($path) = @_;

    return scalar(grep { (readlink($_) // '') eq $path } glob("/proc/$$/fd/*"));
}

my ($provider, $info, $log, $archive) = container();
is_deeply([$provider->backup_container_prepare(101, $info)], [], 'prepare returns nothing');
is(handles_on($archive), 1, 'this process holds the archive open');
my $exec = `/bin/ls -l /proc/self/fd`;
unlike($exec, qr/archive\.tar|socket:/, 'another program gets neither handle');
my $owner = BridgeTest::node_pid($provider);

my ($answer, $lines) = in_child(sub { return $provider->backup_container(101, "c\n", ['/tmp/?*', "\xff"], $info) }, $log);
is_deeply($answer, { result => undef }, 'the child has nothing to return, and that is JSON');
like($lines->[0], qr/^info: backup_container 101 c\s+\/tmp\/\?\* .*"sources":\["\.\/","\.\/mnt\/x"\]/, 'the params arrive');
is($lines->[1], 'info: handles', 'of the handles of this process the second Node has those two alone');
is_deeply([@$lines[2, 3]], ['info: answer {"log":["info","archive of 7 bytes"]}', 'info: answer {"ok":true}'],
    'the first Node finds what the second wrote, and answers');
is(BridgeTest::node_pid($provider), $owner, 'the Node of this process is the same');
$provider->backup_cleanup(101, 'lxc', 1, {});
is(handles_on($archive), 0, 'the cleanup closes the archive');

($provider, $info, $log, $archive) = container();
$provider->backup_container_prepare(101, $info);
is_deeply([$provider->backup_container(101, 'c', [], $info)], [], 'without a fork: nothing is returned');
is($log->[-1], 'info: answer {"ok":true}', 'and it works');
is(handles_on($archive), 0, 'the archive is closed');
ok(kill(0, BridgeTest::node_pid($provider)), 'the first Node lives on');

for my $case (['container-fails', "Cannot do it: refused on purpose\n"], ['container-crashes', qr/bridge is gone, it exited with status 7\n$/]) {
    my ($behaviour, $expected) = @$case;
    ($provider, $info, $log) = container('test-behaviour' => $behaviour);
    $provider->backup_container_prepare(101, $info);
    ($answer) = in_child(sub { $provider->backup_container(101, 'c', [], $info) }, $log);
    ref($expected)
        ? like($answer->{error}, $expected, "$behaviour: dies with a string")
        : is($answer->{error}, $expected, "$behaviour: dies with a string");
}

($provider, $info) = container('test-behaviour' => 'refuse');
is(
    BridgeTest::failure(sub { $provider->backup_container_prepare(101, $info) }),
    "Cannot back up containers: refused on purpose\n", 'prepare passes a refusal on',
);
is(
    BridgeTest::failure(sub { $provider->backup_container(101, 'c', [], $info) }),
    "Cannot back up container 101: it was not prepared\n", 'nothing to do without prepare',
);

($provider, $info, $log, $archive) = container('test-behaviour' => 'container-swapped');
$provider->backup_container_prepare(101, $info);
is(handles_on("$archive.moved"), 1, 'the file that Node holds is the one that is handed over');
is(handles_on('/etc/passwd') + handles_on($archive), 0, 'not what has its name by now');
$provider->backup_cleanup(101, 'lxc', 0, {});

($provider, $info, $log, $archive) = container('test-behaviour' => 'container-no-handle');
is(
    BridgeTest::failure(sub { $provider->backup_container_prepare(101, $info) }),
    "Cannot use the answer of the backup bridge: \"$archive\" is not a valid handle path\n", 'a path in a share is refused',
);
for my $case (['a folder', '/proc'], ['a device', '/dev/null']) {
    my ($what, $path) = @$case;
    open(my $handle, '<', $path) or die "$path: $!";
    my $handle_path = "/proc/$$/fd/" . fileno($handle);
    like(
        BridgeTest::failure(sub { PVE::BackupProvider::Bridge::Handoff->take([{ kind => 'file', path => $handle_path }]) }),
        qr!^Cannot open "$handle_path" for the container's backup: (?:it is not a regular file|Is a directory)$!, "$what is refused",
    );
}

($provider, $info, $log, $archive) = container();
symlink('/etc/passwd', $archive) or die;
like(BridgeTest::failure(sub { $provider->backup_container_prepare(101, $info) }), qr/EEXIST/, 'a taken name is refused');

done_testing();
