# SPDX-License-Identifier: AGPL-3.0-or-later
# Everything that a storage for backups alone does not do. PVE's own implementations would work on
# files that happen to lie in the folder, so each one is refused by name.
package PVE::BackupProvider::Bridge::Refusals;

use strict;
use warnings;

my $refuse = sub {
    my ($what) = @_;

    die "Cannot $what: a storage of type \"backup-provider-dir-example\" holds backups only\n";
};

# For methods that take a snapshot name besides a volume.
sub refuse_snapname {
    my ($class, $volname, $snapname) = @_;

    die "Cannot use the snapshot \"$snapname\" of \"$volname\": backups have no snapshots\n"
        if defined($snapname);
    return;
}

# Volumes of guests

sub alloc_image { $refuse->('allocate a disk image') }
sub clone_image { $refuse->('clone a disk image') }
sub create_base { $refuse->('create a base image') }
sub volume_resize { $refuse->('resize a volume') }
sub rename_volume { $refuse->('rename a volume') }
sub qemu_blockdev_options { $refuse->('attach a volume to a virtual machine') }
sub list_images { return [] }

# Snapshots

sub volume_snapshot { $refuse->('create a snapshot') }
sub volume_snapshot_info { $refuse->('list snapshots') }
sub volume_snapshot_rollback { $refuse->('roll back to a snapshot') }
sub volume_rollback_is_possible { $refuse->('roll back to a snapshot') }
sub volume_snapshot_delete { $refuse->('delete a snapshot') }
sub volume_snapshot_needs_fsfreeze { $refuse->('create a snapshot') }
sub volume_qemu_snapshot_method { $refuse->('create a snapshot') }
sub rename_snapshot { $refuse->('rename a snapshot') }

# Moving volumes between storages

sub volume_export { $refuse->('export a volume') }
sub volume_export_formats { return () }
sub volume_import { $refuse->('import a volume') }
sub volume_import_formats { return () }
sub get_import_metadata { $refuse->('import a guest') }
sub storage_can_replicate { return 0 }

sub volume_has_feature { return 0 }

1;
