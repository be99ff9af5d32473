#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Another provider of Proxmox VE's kind, written from the description of the file and without our code:
#   nbd-contender.pl TREE ROUNDS     takes and leaves nodes as nbd-contender.ts does; its lines are left to expire
#   nbd-contender.pl TREE hold       takes the lock, prints "locked", lets go of it when stdin ends
use strict;
use warnings;

use Fcntl qw(:flock O_WRONLY O_CREAT O_EXCL);
use IO::File;
use Time::HiRes qw(sleep);

$| = 1;
my ($dir) = ($ARGV[0] // '') =~ m!^(/[\w./-]+)$! or die "no folder\n";
my ($what) = ($ARGV[1] // '') =~ m/^(\d+|hold)$/ or die "no number of rounds\n";
my $file = "$dir/run/qemu-server/reserved-dev-nbd-nodes";

# As PVE::Tools::lock_file: opened for appending, tried, then waited for with a limit.
sub locked {
    my ($code) = @_;

    my $fh = IO::File->new("$dir/run/lock/qemu-server/reserved-dev-nbd-nodes.lock", '>>') or die "lock file: $!\n";
    if (!flock($fh, LOCK_EX | LOCK_NB)) {
        local $SIG{ALRM} = sub { die "got timeout\n" };
        alarm(30);
        flock($fh, LOCK_EX) or die "flock: $!\n";
        alarm(0);
    }
    return $code->();
}

sub reserve {
    my %used;
    my $now = time();
    if (my $fh = IO::File->new($file, '<')) {
        while (defined(my $line = <$fh>)) {
            die "strange line: $line" if $line !~ m/^(\d+)\s(\d+)\n\z/;
            $used{$1} = $2 if $2 + 60 > $now;
        }
    }
    my $n = 0;
    $n++ while $used{$n} || -e "$dir/sys/block/nbd$n/pid";
    die "no node is left\n" if !-d "$dir/sys/block/nbd$n";
    $used{$n} = $now;
    my $out = IO::File->new("$file.tmp.$$", O_WRONLY | O_CREAT | O_EXCL) or die "temporary file: $!\n";
    print $out "$_ $used{$_}\n" for keys %used;
    close($out) or die "close: $!\n";
    rename("$file.tmp.$$", $file) or die "rename: $!\n";
    return $n;
}

if ($what eq 'hold') {
    locked(sub { print "locked\n"; <STDIN> });
    exit(0);
}
for my $round (1 .. $what) {
    my $n = locked(\&reserve);
    my $pid_file = "$dir/sys/block/nbd$n/pid";
    sysopen(my $fh, $pid_file, O_WRONLY | O_CREAT | O_EXCL) or do { print "collision at $n: $!\n"; next };
    close($fh);
    sleep(0.001 * ($round % 4));
    unlink($pid_file);
}
print "done\n";
