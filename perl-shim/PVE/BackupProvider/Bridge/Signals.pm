# SPDX-License-Identifier: AGPL-3.0-or-later
# The caller's signal handlers may die: where that would leave something half done, signals wait.
package PVE::BackupProvider::Bridge::Signals;

use strict;
use warnings;

use POSIX qw(:signal_h);

use base qw(Exporter);

our @EXPORT_OK = qw(without_signals);

# Returns what $code returns, or dies as it dies. A signal that arrives meanwhile is delivered afterwards.
sub without_signals {
    my ($code) = @_;

    my ($all, $before) = (POSIX::SigSet->new(), POSIX::SigSet->new());
    $all->fillset();
    my @result = eval {
        # If Perl still has a handler to run for a signal, it runs here at the latest.
        sigprocmask(SIG_BLOCK, $all, $before) or die "Cannot hold signals back: $!\n";
        $code->();
    };
    my $err = $@;
    sigprocmask(SIG_SETMASK, $before);
    die $err if $err;
    return wantarray ? @result : $result[-1];
}

1;
