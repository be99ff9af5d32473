# SPDX-License-Identifier: AGPL-3.0-or-later
# Storage type "backup-provider-dir-example": a folder of backups. Options, the path and its checks
# live here; everything that looks into the store is forwarded to a short-lived Node.
package PVE::Storage::Custom::BackupProviderDirExamplePlugin;

use strict;
use warnings;

use File::Spec;

use PVE::BackupProvider::Bridge::BackupFolder;
use PVE::BackupProvider::Bridge::Retention;
use PVE::BackupProvider::Bridge::Values qw(list_in object_in shown untaint untainted_size);
use PVE::BackupProvider::Plugin::DirectoryExample;
use PVE::Tools;

# The first one declares what this storage type refuses.
use base qw(PVE::BackupProvider::Bridge::Refusals PVE::Storage::Plugin);

# A listing of a large store on a slow share takes its time; a share that hangs takes for ever.
our $STORE_SECONDS = 120;

# The newest version of the storage API that this plugin was tested with.
use constant TESTED_APIVER => 15;

# Configuration

sub api {
    my $host = PVE::Storage::APIVER();
    return $host < TESTED_APIVER ? $host : TESTED_APIVER;
}

sub type {
    return 'backup-provider-dir-example';
}

sub plugindata {
    return {
        content => [{ backup => 1 }, { backup => 1 }],
        features => { 'backup-provider' => 1 },
        'sensitive-properties' => {},
    };
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

sub parse_volname {
    my ($class, $volname) = @_;

    if ($volname =~ m!\Abackup/@{[PVE::BackupProvider::Bridge::Values::ARCHIVE_NAME]}\z!) {
        my ($vmid, $type, $epoch) = ($1, $2, $3);
        return ('backup', "$vmid/$type-$epoch", $vmid, undef, undef, undef, 'directory');
    }
    die 'Cannot use the volume name "' . shown($volname) . "\": backup/<vmid>/<qemu or lxc>-<time> is wanted\n";
}

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

# Life of the storage: polled every ten seconds, so without Node, and bounded in time

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

sub deactivate_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $cache) = @_;

    $class->refuse_snapname($volname, $snapname);
    return;
}

# What looks into the store

# One call to a Node of its own, bounded in time; it has ended when this returns.
sub call_node {
    my ($class, $scfg, $storeid, $method, $params) = @_;

    my $log = sub { warn "$_[1]\n" if $_[0] ne 'info' };
    my $provider = $class->new_backup_provider($scfg, $storeid, $log);
    my $result = $provider->{bridge}->call($method, $params, undef, $STORE_SECONDS);
    $provider->{bridge}->close();
    return $result;
}

sub list_volumes {
    my ($class, $storeid, $scfg, $vmid, $content_types) = @_;

    return [] if !grep { $_ eq 'backup' } @$content_types;
    my $params = defined($vmid) ? { vmid => int($vmid) } : {};
    my $result = $class->call_node($scfg, $storeid, 'list_volumes', $params);
    my $volumes = list_in($result->{volumes}, '"volumes"');
    return [map { list_entry($storeid, object_in($_, 'a volume')) } @$volumes];
}

sub list_entry {
    my ($storeid, $volume) = @_;

    my $entry = {
        volid => "$storeid:" . untaint($volume->{volname}, 'volume name'),
        content => 'backup',
        vmid => untainted_size($volume->{vmid}),
        subtype => untaint($volume->{subtype}, 'guest type'),
        ctime => untainted_size($volume->{ctime}),
        size => untainted_size($volume->{size}),
        format => untaint($volume->{format}, 'format'),
    };
    $entry->{protected} = 1 if $volume->{protected};
    $entry->{notes} = untaint($volume->{notes}, 'text') if defined($volume->{notes});
    $entry->{parent} = "$storeid:" . untaint($volume->{parent}, 'volume name') if defined($volume->{parent});
    return $entry;
}

sub volume_size_info {
    my ($class, $scfg, $storeid, $volname, $timeout) = @_;

    $class->parse_volname($volname);
    my $info = $class->call_node($scfg, $storeid, 'volume_size_info', { volname => "$volname" });
    my $size = untainted_size($info->{size});
    return $size if !wantarray;
    my $parent = defined($info->{parent}) ? untaint($info->{parent}, 'volume name') : undef;
    return ($size, untaint($info->{format}, 'format'), untainted_size($info->{used}), $parent);
}

sub get_volume_attribute {
    my ($class, $scfg, $storeid, $volname, $attribute) = @_;

    $class->parse_volname($volname);
    my $params = { volname => "$volname", attribute => "$attribute" };
    my $value = $class->call_node($scfg, $storeid, 'get_volume_attribute', $params)->{value};
    return defined($value) ? untaint($value, 'text') : undef;
}

sub update_volume_attribute {
    my ($class, $scfg, $storeid, $volname, $attribute, $value) = @_;

    $class->parse_volname($volname);
    my $params = { volname => "$volname", attribute => "$attribute", value => defined($value) ? "$value" : undef };
    $params->{value} = $value ? 1 : 0 if $attribute eq 'protected';
    $class->call_node($scfg, $storeid, 'update_volume_attribute', $params);
    return;
}

sub free_image {
    my ($class, $storeid, $scfg, $volname, $is_base, $format) = @_;

    $class->parse_volname($volname);
    $class->call_node($scfg, $storeid, 'free_volume', { volname => "$volname" });
    return undef;
}

sub prune_backups {
    my ($class, $scfg, $storeid, $keep, $vmid, $type, $dryrun, $logfunc) = @_;

    my $backups = $class->list_volumes($storeid, $scfg, $vmid, ['backup']);
    return PVE::BackupProvider::Bridge::Retention::prune($backups, $keep, $type, $dryrun);
}

sub new_backup_provider {
    my ($class, $scfg, $storeid, $log_function) = @_;

    return PVE::BackupProvider::Plugin::DirectoryExample->new($class, $scfg, $storeid, $log_function);
}

1;
