#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Volumes that are passed as files: Node finds the handle, requests regions, deallocates ranges; and what a closure, a
# handle or a signal can do meanwhile.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use Scalar::Util qw(tainted);
use Test::More;
use Time::HiRes qw(alarm getitimer time ITIMER_REAL);

use PVE::BackupProvider::Bridge::FileHandles;
use PVE::Storage::Common;

BridgeTest::use_fake_bridge();
my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
my $path = "$dir/disk.raw";
PVE::Tools::file_set_contents($path, 'x' x (1024 * 1024));
our ($provider, $log) = BridgeTest::provider('test-behaviour' => 'file-handle');

# A volume as PVE passes it; @regions is what its closure gives.
sub volume {
    my (@regions) = @_;

    open(my $handle, '+<', $path) or die;
    return {
        size => 1048576, 'bitmap-mode' => 'reuse', 'file-handle' => $handle,
        'next-dirty-region' => sub { return @{ shift(@regions) // [] } },
    };
}

sub backup {
    my ($volume) = @_;

    @$log = ();
    return $provider->backup_vm(100, 'x', { 'drive-scsi0' => $volume }, {});
}

my $nothing = substr($^X, 0, 0);
ok(tainted("65536$nothing"), 'there is tainted data in this test');
backup(volume(["65536$nothing", "4096$nothing"]));
is((grep { m/handle of/ } @$log)[0], "info: handle of drive-scsi0: $path", 'Node finds the open file');
is((grep { m/^info: drive/ } @$log)[0], 'info: drive-scsi0: 65536+4096 done', 'regions may be tainted');
my $pid = BridgeTest::node_pid($provider);

my $volume = volume();
close($volume->{'file-handle'});
my $closed = "Cannot hand over the file handle of \"drive-scsi0\": it is not open\n";
is(BridgeTest::failure(sub { backup($volume) }), $closed, 'a closed handle is refused');
is(BridgeTest::failure(sub { backup({ %$volume, 'file-handle' => 'text' }) }), $closed, 'and what is no handle');
open(my $in_memory, '<', \"text") or die;
is(BridgeTest::failure(sub { backup({ %$volume, 'file-handle' => $in_memory }) }), $closed, 'and one without a file');

# An error of this process comes out, and Node has stopped working by then.
$volume = { %{ volume() }, 'next-dirty-region' => sub { die "unexpected output from nbdinfo\n" } };
is(BridgeTest::failure(sub { backup($volume) }), "unexpected output from nbdinfo\n", 'the closure may die');
$volume = { %{ volume() }, 'next-dirty-region' => sub { return ('many', 1) } };
is(BridgeTest::failure(sub { backup($volume) }), "Cannot use an offset: \"many\" is not a number\n", 'or talk nonsense');
{
    local $SIG{TERM} = sub { die "interrupted by signal\n" };
    $volume = { %{ volume() }, 'next-dirty-region' => sub { kill('TERM', $$); return (0, 1) } };
    is(BridgeTest::failure(sub { backup($volume) }), "interrupted by signal\n", 'a signal during the closure');

    no warnings 'redefine';
    local *PVE::Storage::Common::deallocate = sub { kill('TERM', $$); die "fallocate failed\n" };
    is(BridgeTest::failure(sub { backup(volume([0, 65536])) }), "interrupted by signal\n",
        'a signal while ranges are given up is no failure to give them up');
}
{
    no warnings 'redefine';
    local *PVE::Storage::Common::deallocate = sub { die "fallocate failed - Bad file descriptor\n" };
    is(BridgeTest::failure(sub { backup(volume([0, 65536])) }),
        "Cannot run \"deallocate\" on the Perl side: fallocate failed - Bad file descriptor\n",
        'ranges that cannot be given up: Node is told, and decides');
}
{
    # For as long as Node says.
    local ($provider, $log) = BridgeTest::provider('test-behaviour' => 'file-handle', 'test-timeout-ms' => 700);
    my $hangs = { %{ volume() }, 'next-dirty-region' => sub { select(undef, undef, undef, 60) for 1 .. 10; return } };
    my $start = time();
    is(BridgeTest::failure(sub { backup($hangs) }),
        "Cannot read the dirty regions: no answer for 1 seconds\n", 'a closure that hangs');
    cmp_ok(time() - $start, '<', 30, 'in bounded time');
    my $left = 0;
    my $looks = { %{ volume() }, 'next-dirty-region' => sub { $left = getitimer(ITIMER_REAL); return } };
    ($provider, $log) = BridgeTest::provider('test-behaviour' => 'file-handle', 'test-timeout-ms' => 3_600_000);
    backup($looks);
    cmp_ok($left, '>', 3000, 'an hour, where that is what Node says');
    is(getitimer(ITIMER_REAL), 0, 'and only while the closure runs');
    local $SIG{ALRM} = sub { die "the caller's own alarm\n" };
    alarm(0.5);
    is(BridgeTest::failure(sub { backup($hangs) }), "the caller's own alarm\n", "an alarm of the caller's is left alone");
    alarm(0);
}

backup(volume([0, 4096]));
is((grep { m/^info: drive/ } @$log)[0], 'info: drive-scsi0: 0+4096 done', 'after all of this the next one works');
is(BridgeTest::node_pid($provider), $pid, 'and it is still the same Node');

done_testing();
