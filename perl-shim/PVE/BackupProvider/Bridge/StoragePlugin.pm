# SPDX-License-Identifier: AGPL-3.0-or-later
# What all storage plugins in front of a provider have in common: listing, sizes, attributes, removal and retention
# are forwarded to a short-lived Node, and whatever is not a backup is refused. A plugin has this class as its base,
# and adds its type, properties, options, path, activation, and the class methods provider_class(),
# archive_name_rule() and archive_format().
# See docs/writing-a-provider.md.
package PVE::BackupProvider::Bridge::StoragePlugin;

use strict;
use warnings;

use JSON;

use PVE::BackupProvider::Bridge::Values qw(list_in number object_in shown untaint untainted_size);

# The first base class declares what such a storage refuses.
use base qw(PVE::BackupProvider::Bridge::Refusals PVE::Storage::Plugin);

# Listing a large store on a slow share takes its time; on a share that hangs it never ends.
our $STORE_SECONDS = 120;

# The newest version of the storage API that this class was tested with.
use constant TESTED_APIVER => 15;

# What a plugin adds

# The class of its provider: PVE::BackupProvider::Bridge::Provider, or one that has it as its base.
sub provider_class { my ($class) = @_; die "$class has no provider_class\n" }

# A pattern for the archive names of its provider, whose first group is the guest id; and the same rule in words.
sub archive_name_rule { my ($class) = @_; die "$class has no archive_name_rule\n" }

# The text for the GUI's Format column.
sub archive_format { my ($class) = @_; die "$class has no archive_format\n" }

# Configuration

sub api {
    my $host = PVE::Storage->APIVER; # as a method: constants are copied where they are called
    return $host < TESTED_APIVER ? $host : TESTED_APIVER;
}

sub plugindata {
    return {
        content => [{ backup => 1 }, { backup => 1 }],
        features => { 'backup-provider' => 1 },
        'sensitive-properties' => {},
    };
}

# Names

sub parse_volname {
    my ($class, $volname) = @_;

    my ($pattern, $words) = $class->archive_name_rule();
    my ($name) = $volname =~ m!\Abackup/(.*)\z!;
    my ($vmid) = defined($name) ? $name =~ m!\A$pattern\z! : ();
    die 'Cannot use the volume name "' . shown($volname) . "\": expected backup/$words\n" if !defined($vmid);
    return ('backup', $name, $vmid, undef, undef, undef, $class->archive_format());
}

sub deactivate_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $cache) = @_;

    $class->refuse_snapname($volname, $snapname);
    return;
}

# What reads the store

# One call to a separate Node process, bounded in time; the process has ended when this returns.
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
    return [map { $class->list_entry($storeid, object_in($_, 'a volume')) } @$volumes];
}

sub list_entry {
    my ($class, $storeid, $volume) = @_;

    my $entry = {
        volid => $class->volid_of($storeid, $volume->{volname}),
        content => 'backup',
        vmid => untainted_size($volume->{vmid}),
        subtype => untaint($volume->{subtype}, 'guest type'),
        ctime => untainted_size($volume->{ctime}),
        size => untainted_size($volume->{size}),
        format => untaint($volume->{format}, 'format'),
    };
    $entry->{protected} = 1 if $volume->{protected};
    $entry->{notes} = untaint($volume->{notes}, 'text') if defined($volume->{notes});
    $entry->{parent} = $class->volid_of($storeid, $volume->{parent}) if defined($volume->{parent});
    return $entry;
}

sub volid_of {
    my ($class, $storeid, $volname) = @_;

    my $clean = untaint($volname, 'volume name');
    $class->parse_volname($clean);
    return "$storeid:$clean";
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

# Node decides which backups stay, by PVE's own rules. A dry run only marks.
sub prune_backups {
    my ($class, $scfg, $storeid, $keep, $vmid, $type, $dryrun, $logfunc) = @_;

    my $params = {
        keep => { map { $_ => number($keep->{$_}, $_) } grep { defined($keep->{$_}) } keys(%{ $keep // {} }) },
        defined($vmid) ? (vmid => number($vmid, 'the guest id')) : (),
        defined($type) ? (type => "$type") : (),
        dryrun => $dryrun ? JSON::true : JSON::false,
    };
    my $result = $class->call_node($scfg, $storeid, 'prune_backups', $params);
    return [map { $class->prune_entry($storeid, object_in($_, 'a backup')) } @{ list_in($result->{backups}, '"backups"') }];
}

sub prune_entry {
    my ($class, $storeid, $backup) = @_;

    return {
        volid => $class->volid_of($storeid, $backup->{volname}),
        vmid => untainted_size($backup->{vmid}),
        type => untaint($backup->{type}, 'guest type'),
        ctime => untainted_size($backup->{ctime}),
        mark => untaint($backup->{mark}, 'mark'),
    };
}

sub new_backup_provider {
    my ($class, $scfg, $storeid, $log_function) = @_;

    return $class->provider_class()->new($class, $scfg, $storeid, $log_function);
}

1;
