#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Reads one volume name a line, its bytes in hex; prints what the storage plugin makes of it: the parts of its
# answer, or "-" if it dies with one sentence.
use strict;
use warnings;

use PVE::Storage;

my $plugin = PVE::Storage::Plugin->lookup(PVE::Storage::TYPE());
while (my $line = <STDIN>) {
    chomp($line);
    my @parts = eval { $plugin->parse_volname(pack('H*', $line)) };
    my $problem = $@;
    die "no sentence: $problem" if $problem ne '' && $problem !~ m/\ACannot use [^\x00-\x1f\x7f]{1,400}\n\z/;
    print $problem eq '' ? join(' ', map { $_ // '' } @parts) : '-', "\n";
}
