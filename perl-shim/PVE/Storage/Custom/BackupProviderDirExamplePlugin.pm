# SPDX-License-Identifier: AGPL-3.0-or-later
# Storage type "backup-provider-dir-example": a directory of backups. This module has the options, the path and its
# checks; the base class does the rest, as for every storage plugin of the bridge.
package PVE::Storage::Custom::BackupProviderDirExamplePlugin;

use strict;
use warnings;

use File::Spec;

use PVE::BackupProvider::Plugin::DirectoryExample;

use base qw(PVE::BackupProvider::Bridge::DirectoryStoragePlugin);

# Configuration

sub type {
    return 'backup-provider-dir-example';
}

sub properties {
    return {
        'vm-backup-mechanism' => {
            description => "How the data of virtual machines is read.",
            type => 'string',
            enum => ['nbd', 'file-handle'],
            default => 'nbd',
            optional => 1,
        },
        'vm-backup-mode' => {
            description => "Back up virtual machines in full every time, or only what has changed.",
            type => 'string',
            enum => ['full', 'incremental'],
            default => 'full',
            optional => 1,
        },
        'lxc-backup-mode' => {
            description => "Kind of archive for containers.",
            type => 'string',
            enum => ['tar', 'squashfs'],
            default => 'tar',
            optional => 1,
        },
        'dir-compression' => {
            description => "Compression of every kind of archive.",
            type => 'string',
            enum => ['none', 'zlib', 'zstd'],
            default => 'zstd',
            optional => 1,
        },
        'dir-device-view' => {
            description => "How a restore offers the disks of virtual machines.",
            type => 'string',
            enum => ['auto', 'fuse', 'nbd'],
            default => 'auto',
            optional => 1,
        },
        'dir-nbd-timeout' => {
            description => "How many seconds the NBD server of a virtual machine may be silent"
                . " before its backup fails.",
            type => 'integer',
            minimum => 5,
            maximum => 3600,
            default => 300,
            optional => 1,
        },
        'dir-full-read-every' => {
            description => "After how many days all of a virtual machine's disks is read again, whatever QEMU says"
                . " has changed; 0 for never.",
            type => 'integer',
            minimum => 0,
            maximum => 3650,
            default => 30,
            optional => 1,
        },
        'dir-verify-restore' => {
            description => "Compare what a restore reads with the checksums of the backup.",
            type => 'boolean',
            default => 1,
            optional => 1,
        },
    };
}

sub options {
    return {
        path => { fixed => 1 },
        content => { optional => 1 },
        nodes => { optional => 1 },
        disable => { optional => 1 },
        shared => { optional => 1 },
        is_mountpoint => { optional => 1 },
        'create-base-path' => { optional => 1 },
        'prune-backups' => { optional => 1 },
        'max-protected-backups' => { optional => 1 },
        'vm-backup-mechanism' => { optional => 1 },
        'vm-backup-mode' => { optional => 1 },
        'lxc-backup-mode' => { optional => 1 },
        'dir-compression' => { optional => 1 },
        'dir-device-view' => { optional => 1 },
        'dir-nbd-timeout' => { optional => 1 },
        'dir-full-read-every' => { optional => 1 },
        'dir-verify-restore' => { optional => 1 },
    };
}

sub check_config {
    my ($class, $section_id, $config, $create, $skip_schema_check) = @_;

    my $opts = $class->SUPER::check_config($section_id, $config, $create, $skip_schema_check);
    return $opts if !$create;
    die "Cannot use the path \"$opts->{path}\": only letters, digits and -/_.\@ may be in it\n"
        if $opts->{path} !~ m!^/[-/a-zA-Z0-9_.@]+$!;
    $opts->{path} = File::Spec->canonpath($opts->{path});
    return $opts;
}

# Names

sub provider_class { return 'PVE::BackupProvider::Plugin::DirectoryExample' }

sub archive_format { return 'directory' }

# <vmid>/<type>-<time>; every number has exactly one spelling.
sub archive_name_rule {
    return (qr!([1-9][0-9]{2,8})/(?:qemu|lxc)-(?:0|[1-9][0-9]{0,11})!, '<vmid>/<qemu or lxc>-<time>');
}

1;
