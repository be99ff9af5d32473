# SPDX-License-Identifier: AGPL-3.0-or-later
# Volumes of backup_vm that are passed as file handles. Node opens the file itself, through /proc. Reverse requests
# cover what only this process can do: dirty regions come from a Perl closure, and deallocating a range takes a handle
# that may write. See "Reverse requests" in docs/rpc-protocol.md.
package PVE::BackupProvider::Bridge::FileHandles;

use strict;
use warnings;

use JSON;
use Time::HiRes qw(getitimer setitimer ITIMER_REAL);

use PVE::BackupProvider::Bridge::Signals qw(without_signals);
use PVE::BackupProvider::Bridge::Values qw(number one_line);

# The path by which Node finds the open file. Dies if it is not open.
sub reference {
    my ($handle, $device) = @_;

    my $fd = eval { fileno($handle) } // -1;
    die "Cannot hand over the file handle of \"" . one_line($device) . "\": it is not open\n" if $fd < 0;
    return { pid => int($$), fd => int($fd) };
}

# The handlers for $volumes as PVE passes them to backup_vm.
sub handlers {
    my ($volumes) = @_;

    my $volume_of = sub {
        my ($params, $key) = @_;

        my $device = $params->{device} // '';
        my $part = exists($volumes->{$device}) ? $volumes->{$device}->{$key} : undef;
        die "the device \"" . one_line($device) . "\" has no $key\n" if !defined($part);
        return $part;
    };
    return {
        next_dirty_regions => sub {
            my ($params) = @_;

            my $next_dirty_region = $volume_of->($params, 'next-dirty-region');
            my $max = number($params->{max}, 'max');
            my $seconds = number($params->{seconds}, 'seconds');
            return in_time(sub { next_dirty_regions($next_dirty_region, $max) }, $seconds);
        },
        deallocate => sub {
            my ($params) = @_;

            return deallocate($volume_of->($params, 'file-handle'), $params->{ranges});
        },
    };
}

sub next_dirty_regions {
    my ($next_dirty_region, $max) = @_;

    my @regions;
    while (@regions < $max) {
        my ($offset, $length) = $next_dirty_region->();
        return { regions => \@regions, done => JSON::true } if !defined($offset);
        push(@regions, [number($offset, 'an offset'), number($length, 'a length')]);
    }
    return { regions => \@regions, done => JSON::false };
}

# A failure to deallocate does not end the backup: returns (undef, why). A signal that arrives meanwhile must not look
# like such a failure; its handler runs afterwards, and may die.
sub deallocate {
    my ($handle, $ranges) = @_;

    require PVE::Storage::Common;
    my $problem = without_signals(sub {
        my $is_done = eval {
            for my $range (@$ranges) {
                my ($offset, $length) = map { number($_, 'a range') } @$range[0, 1];
                PVE::Storage::Common::deallocate($handle, $offset, $length);
            }
            1;
        };
        return $is_done ? undef : $@;
    });
    return (undef, $problem);
}

# Returns what $code returns; dies if it takes longer than $seconds: PVE's closure reads from nbdinfo, which waits for
# QEMU without a limit. An alarm that the caller has set stays as it is.
sub in_time {
    my ($code, $seconds) = @_;

    return $code->() if getitimer(ITIMER_REAL);
    local $SIG{ALRM} = sub { die "Cannot read the dirty regions: no answer for $seconds seconds\n" };
    setitimer(ITIMER_REAL, $seconds);
    my $result = eval { $code->() };
    my $err = $@;
    setitimer(ITIMER_REAL, 0);
    die $err if $err;
    return $result;
}

1;
