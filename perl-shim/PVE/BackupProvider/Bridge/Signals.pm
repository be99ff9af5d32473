# SPDX-License-Identifier: AGPL-3.0-or-later
# Handlers of the caller's signals may die: where that would tear something apart, they wait.
package PVE::BackupProvider::Bridge::Signals;

use strict;
use warnings;

use POSIX qw(:signal_h);

use base qw(Exporter);

our @EXPORT_OK = qw(without_signals);

# What $code returns or dies with. A signal that comes meanwhile is delivered afterwards.
sub without_signals {
    my ($code) = @_;

    my ($all, $before) = (POSIX::SigSet->new(), POSIX::SigSet->new());
    $all->fillset();
    my @result = eval {
        # A handler that Perl still owes a signal runs here, at the latest.
        sigprocmask(SIG_BLOCK, $all, $before) or die "Cannot hold signals back: $!\n";
        $code->();
    };
    my $err = $@;
    sigprocmask(SIG_SETMASK, $before);
    die $err if $err;
    return wantarray ? @result : $result[-1];
}

1;
