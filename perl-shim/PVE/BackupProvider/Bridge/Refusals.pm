# SPDX-License-Identifier: AGPL-3.0-or-later
# Everything that a storage for backups alone does not do. PVE's default implementations would work on files that
# happen to be in its directory, so each such method is refused by name.
package PVE::BackupProvider::Bridge::Refusals;

use strict;
use warnings;

my $refuse = sub {
    my ($class, $what) = @_;

    die "Cannot $what: a storage of type \"" . $class->type() . "\" holds backups only\n";
};

# For methods that take a snapshot name in addition to a volume.
sub refuse_snapname {
    my ($class, $volname, $snapname) = @_;

    die "Cannot use the snapshot \"$snapname\" of \"$volname\": backups have no snapshots\n"
        if defined($snapname);
    return;
}

# Volumes of guests

sub alloc_image { $refuse->($_[0], 'allocate a disk image') }
sub clone_image { $refuse->($_[0], 'clone a disk image') }
sub create_base { $refuse->($_[0], 'create a base image') }
sub volume_resize { $refuse->($_[0], 'resize a volume') }
sub rename_volume { $refuse->($_[0], 'rename a volume') }
sub qemu_blockdev_options { $refuse->($_[0], 'attach a volume to a virtual machine') }
sub list_images { return [] }

# Snapshots

sub volume_snapshot { $refuse->($_[0], 'create a snapshot') }
sub volume_snapshot_info { $refuse->($_[0], 'list snapshots') }
sub volume_snapshot_rollback { $refuse->($_[0], 'roll back to a snapshot') }
sub volume_rollback_is_possible { $refuse->($_[0], 'roll back to a snapshot') }
sub volume_snapshot_delete { $refuse->($_[0], 'delete a snapshot') }
sub volume_snapshot_needs_fsfreeze { $refuse->($_[0], 'create a snapshot') }
sub volume_qemu_snapshot_method { $refuse->($_[0], 'create a snapshot') }
sub rename_snapshot { $refuse->($_[0], 'rename a snapshot') }

# Moving volumes between storages

sub volume_export { $refuse->($_[0], 'export a volume') }
sub volume_export_formats { return () }
sub volume_import { $refuse->($_[0], 'import a volume') }
sub volume_import_formats { return () }
sub get_import_metadata { $refuse->($_[0], 'import a guest') }
sub storage_can_replicate { return 0 }

sub volume_has_feature { return 0 }

1;
