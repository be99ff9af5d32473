# SPDX-License-Identifier: AGPL-3.0-or-later
# Base of a storage plugin whose storage is a directory, the option "path", with each archive at its name below it.
package PVE::BackupProvider::Bridge::DirectoryStoragePlugin;

use strict;
use warnings;

use PVE::BackupProvider::Bridge::BackupFolder;
use PVE::Tools;

use base qw(PVE::BackupProvider::Bridge::StoragePlugin);

sub filesystem_path {
    my ($class, $scfg, $volname, $snapname) = @_;

    $class->refuse_snapname($volname, $snapname);
    my (undef, $name, $vmid) = $class->parse_volname($volname);
    my $path = "$scfg->{path}/$name";
    return wantarray ? ($path, $vmid, 'backup') : $path;
}

sub path {
    my ($class, $scfg, $volname, $storeid, $snapname) = @_;

    return $class->filesystem_path($scfg, $volname, $snapname);
}

# Activation and status: polled every ten seconds, so without Node, and bounded in time

sub activate_storage {
    my ($class, $storeid, $scfg, $cache) = @_;

    PVE::BackupProvider::Bridge::BackupFolder::activate($storeid, $scfg);
    return;
}

sub status {
    my ($class, $storeid, $scfg, $cache) = @_;

    return PVE::BackupProvider::Bridge::BackupFolder::status($storeid, $scfg);
}

sub activate_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $cache, $hints) = @_;

    my $path = $class->filesystem_path($scfg, $volname, $snapname);
    my ($exists) = PVE::Tools::run_fork_with_timeout(
        PVE::BackupProvider::Bridge::BackupFolder::TIMEOUT_SECONDS, sub { return -d $path ? 1 : 0 },
    );
    die "Cannot find the volume \"$storeid:$volname\": it does not exist or is unreachable\n" if !$exists;
    return;
}

1;
