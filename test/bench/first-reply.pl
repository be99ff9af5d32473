#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# How long the first call of the shim takes, beside an empty Node. Arguments: runs, storage path.
# Prints one line per run: milliseconds of the call, milliseconds of `node -e 0`.
use strict;
use warnings;

use Time::HiRes qw(time);

use PVE::BackupProvider::Bridge;
use PVE::BackupProvider::Bridge::NodeProgram;

my ($runs, $path) = map { m/\A(.+)\z/s ? $1 : die "an argument is empty\n" } @ARGV;
$ENV{PATH} = '/usr/bin:/bin';
my ($node) = PVE::BackupProvider::Bridge::NodeProgram::find();

for (1 .. $runs) {
    my $start = time();
    my $bridge = PVE::BackupProvider::Bridge->new(
        storeid => 'bench',
        scfg => { type => 'backup-provider-dir-example', path => $path },
        nodename => 'bench',
        log => sub { },
    );
    $bridge->call('backup_get_mechanism', { vmid => 100, vmtype => 'qemu' });
    my $call = time() - $start;
    $bridge->close();

    $start = time();
    system($node, '-e', '0') == 0 or die "node -e 0 failed\n";
    printf("%.3f %.3f\n", $call * 1000, (time() - $start) * 1000);
}
