# SPDX-License-Identifier: AGPL-3.0-or-later
# Reverse requests of backup_vm: dirty regions come from a Perl closure, and ranges of a file handle
# can only be given up here. See "Reverse requests" in docs/rpc-protocol.md.
package PVE::BackupProvider::Bridge::FileHandles;

use strict;
use warnings;

use JSON;

use PVE::BackupProvider::Bridge::Values qw(number one_line);

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

            return next_dirty_regions(
                $volume_of->($params, 'next-dirty-region'), number($params->{max}, 'max'),
            );
        },
        deallocate => sub {
            my ($params) = @_;

            my $handle = $volume_of->($params, 'file-handle');
            require PVE::Storage::Common;
            for my $range (@{ $params->{ranges} }) {
                my ($offset, $length) = map { number($_, 'a range') } @$range[0, 1];
                PVE::Storage::Common::deallocate($handle, $offset, $length);
            }
            return undef;
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

1;
