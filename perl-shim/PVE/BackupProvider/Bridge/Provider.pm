# SPDX-License-Identifier: AGPL-3.0-or-later
# The methods of PVE::BackupProvider::Plugin::Base, in its order, for every provider behind the bridge. Each one
# forwards to Node, maps arguments, results and errors, and decides nothing. A provider is a class with its own name,
# this class as its base, and provider_name(). See docs/writing-a-provider.md and docs/rpc-protocol.md.
package PVE::BackupProvider::Bridge::Provider;

use strict;
use warnings;

use PVE::BackupProvider::Bridge;
use PVE::BackupProvider::Bridge::FileHandles;
use PVE::BackupProvider::Bridge::Handoff;
use PVE::BackupProvider::Bridge::Values
    qw(encode_bytes decode_bytes list_in number numbers_in object_in one_line line_for_json plain_data text_for_json untaint
    untainted_size);
use PVE::INotify;

use base qw(PVE::BackupProvider::Plugin::Base);

sub new {
    my ($class, $storage_plugin, $scfg, $storeid, $log_function) = @_;

    my $self = bless(
        {
            scfg => $scfg,
            storeid => $storeid,
            log => $log_function,
        },
        $class,
    );
    $self->{bridge} = $self->new_bridge();
    return $self;
}

# Does not start anything yet.
sub new_bridge {
    my ($self) = @_;

    return PVE::BackupProvider::Bridge->new(
        scfg => $self->{scfg},
        storeid => $self->{storeid},
        log => $self->{log},
        nodename => PVE::INotify::nodename(),
    );
}

sub provider_name {
    my ($self) = @_;

    die ref($self) . " has no provider_name\n";
}

# Hooks for the job.

sub job_init {
    my ($self, $start_time) = @_;

    $self->{bridge}->call('job_init', { 'start-time' => number($start_time, 'the start time') });
    return;
}

sub job_cleanup {
    my ($self) = @_;

    $self->{bridge}->call('job_cleanup', {});
    return;
}

sub backup_init {
    my ($self, $vmid, $vmtype, $start_time) = @_;

    my $result = $self->{bridge}->call(
        'backup_init',
        {
            vmid => number($vmid, 'the guest id'),
            vmtype => "$vmtype",
            'start-time' => number($start_time, 'the start time'),
        },
    );
    return { 'archive-name' => untaint($result->{'archive-name'}, 'archive name') };
}

sub backup_cleanup {
    my ($self, $vmid, $vmtype, $success, $info) = @_;

    $self->close_handoff();
    my $error = $info->{error};
    my $result = $self->{bridge}->call(
        'backup_cleanup',
        {
            vmid => number($vmid, 'the guest id'),
            defined($vmtype) ? (vmtype => "$vmtype") : (),
            success => $success ? JSON::true : JSON::false,
            defined($error) ? (error => line_for_json($error)) : (),
        },
    );
    my $stats = object_in($result->{stats}, '"stats"');
    return { stats => { 'archive-size' => untainted_size($stats->{'archive-size'}) } };
}

sub backup_get_mechanism {
    my ($self, $vmid, $vmtype) = @_;

    my $result = $self->{bridge}->call(
        'backup_get_mechanism', { vmid => number($vmid, 'the guest id'), vmtype => "$vmtype" },
    );
    return untaint($result->{mechanism}, 'mechanism');
}

# PVE does not protect this call: if it dies, the whole job ends, including all other guests. So it dies only where
# the job has to end: with the error that a signal handler of PVE dies with.
sub backup_handle_log_file {
    my ($self, $vmid, $filename) = @_;

    my (undef, $problem) = $self->{bridge}->try_call(
        'backup_handle_log_file',
        { vmid => int($vmid), filename => "$filename" }, # int: number() may die
    );
    $self->{log}->('warn', 'cannot keep the log file: ' . one_line($problem)) if defined($problem);
    return;
}

# Hooks for the backup of a VM.

sub backup_vm_query_incremental {
    my ($self, $vmid, $volumes) = @_;

    my $devices = $self->query_devices('backup_vm_query_incremental', $vmid, $volumes);
    return { map { untaint($_, 'device name') => untaint($devices->{$_}, 'mode') } keys %$devices };
}

# The same question as version 7 of the API proposal asked it, for hosts that still do so: the answer is set as
# $volumes->{$device}->{'bitmap-name'}.
sub backup_vm_available_bitmaps {
    my ($self, $vmid, $volumes) = @_;

    my $devices = $self->query_devices('backup_vm_available_bitmaps', $vmid, $volumes);
    for my $device (grep { $volumes->{$_} } keys %$devices) {
        $volumes->{$device}->{'bitmap-name'} = untaint($devices->{$device}, 'bitmap name');
    }
    return;
}

sub query_devices {
    my ($self, $method, $vmid, $volumes) = @_;

    my $sizes = { map { $_ => { size => number($volumes->{$_}->{size}, "the size of $_") } } keys %$volumes };
    my $result = $self->{bridge}->call($method, { vmid => number($vmid, 'the guest id'), volumes => $sizes });
    return object_in($result->{devices}, '"devices"');
}

sub backup_vm {
    my ($self, $vmid, $guest_config, $volumes, $info) = @_;

    my $plain = {};
    for my $device (keys %$volumes) {
        my $volume = { %{ $volumes->{$device} } };
        # The closure stays here; Node gets its results by reverse requests.
        delete($volume->{'next-dirty-region'});
        my $handle = delete($volume->{'file-handle'});
        delete(@$volume{ grep { !defined($volume->{$_}) } keys %$volume });
        $plain->{$device} = numbers_in($volume, 'size');
        $plain->{$device}->{'file-handle'} =
            PVE::BackupProvider::Bridge::FileHandles::reference($handle, $device)
            if defined($handle);
    }
    $self->{bridge}->call(
        'backup_vm',
        {
            vmid => number($vmid, 'the guest id'),
            'guest-config' => encode_bytes($guest_config),
            volumes => $plain,
            info => info_for_rpc($info),
        },
        PVE::BackupProvider::Bridge::FileHandles::handlers($volumes),
    );
    return;
}

# Hooks for the backup of a container.

# This process is still root on the host: it opens here what the child will inherit.
sub backup_container_prepare {
    my ($self, $vmid, $info) = @_;

    $self->close_handoff();
    my $result = $self->{bridge}->call(
        'backup_container_prepare',
        { vmid => number($vmid, 'the guest id'), info => info_for_rpc($info) },
    );
    my $handles = list_in($result->{handles}, '"handles"');
    $self->{handoff} = PVE::BackupProvider::Bridge::Handoff->take([map { wanted_handle($_) } @$handles]);
    return;
}

sub wanted_handle {
    my ($handle) = @_;

    my $kind = untaint(object_in($handle, 'a handle')->{kind}, 'kind of handle');
    # root must not open a path whose parts others can swap.
    return { kind => $kind, path => untaint($handle->{path}, 'handle path') } if $kind eq 'file';
    my $line = $handle->{'first-line'};
    return {
        kind => $kind,
        path => untaint($handle->{path}, 'path'),
        defined($line) ? (line => untaint($line, 'first line')) : (),
    };
}

# A second Node reads the container, because the first one cannot. In a forked child this is the container's user
# namespace; for a privileged container there is no child, but the container is mounted in a mount namespace that was
# created after the first Node. The second one inherits the handles that the first one requested. PVE encodes what
# this returns as JSON, and a child leaves by _exit: so this returns nothing and ends the second Node here.
sub backup_container {
    my ($self, $vmid, $guest_config, $exclude_patterns, $info) = @_;

    my $handoff = $self->{handoff} // die "Cannot back up container $vmid: it was not prepared\n";
    my $bridge = $self->new_bridge();
    eval {
        $bridge->call(
            'backup_container',
            {
                handles => $handoff->inheritable(),
                vmid => number($vmid, 'the guest id'),
                'guest-config' => encode_bytes($guest_config),
                'exclude-patterns' => [map { text_for_json("$_") } @{ $exclude_patterns // [] }],
                info => info_for_rpc($info),
            },
        );
    };
    my $err = $@;
    $bridge->close();
    $self->close_handoff();
    die "$err" if $err;
    return;
}

# This process no longer needs the handles.
sub close_handoff {
    my ($self) = @_;

    my $handoff = delete($self->{handoff});
    $handoff->close() if $handoff;
    return;
}

sub info_for_rpc {
    my ($info) = @_;

    my $plain = numbers_in($info, 'bandwidth-limit', 'backup-user-id');
    if (defined(my $config = delete($plain->{'firewall-config'}))) {
        $plain->{'firewall-config'} = encode_bytes($config);
    }
    return plain_data($plain);
}

# Hooks for the restore. Containers pass an extra $storeid to some of them, before $info.

sub restore_get_mechanism {
    my ($self, $volname, $storeid) = @_;

    my $result = $self->{bridge}->call('restore_get_mechanism', { volname => "$volname" });
    return (untaint($result->{mechanism}, 'mechanism'), untaint($result->{vmtype}, 'guest type'));
}

sub archive_get_guest_config {
    my ($self, $volname, $storeid) = @_;

    my $result = $self->{bridge}->call('archive_get_guest_config', { volname => "$volname" });
    return decode_bytes(untaint($result->{data}, 'base64'));
}

sub archive_get_firewall_config {
    my ($self, $volname, $storeid) = @_;

    my $result = $self->{bridge}->call('archive_get_firewall_config', { volname => "$volname" });
    return defined($result->{data}) ? decode_bytes(untaint($result->{data}, 'base64')) : undef;
}

sub restore_vm_init {
    my ($self, $volname, $storeid) = @_;

    my $result = $self->{bridge}->call('restore_vm_init', { volname => "$volname" });
    my $devices = object_in($result->{devices}, '"devices"');
    my $sizes = {};
    for my $name (keys %$devices) {
        my $device = object_in($devices->{$name}, 'a device');
        $sizes->{ untaint($name, 'device name') } = { size => untainted_size($device->{size}) };
    }
    return $sizes;
}

sub restore_vm_cleanup {
    my ($self, $volname, $storeid) = @_;

    $self->{bridge}->call('restore_vm_cleanup', { volname => "$volname" });
    return;
}

sub restore_vm_volume_init {
    my ($self, $volname, $device_name, $info) = @_;

    my $result = $self->{bridge}->call(
        'restore_vm_volume_init', { volname => "$volname", 'device-name' => "$device_name" },
    );
    $self->note_server("$volname $device_name");
    return { 'qemu-img-path' => untaint($result->{'qemu-img-path'}, 'path') };
}

sub restore_vm_volume_cleanup {
    my ($self, $volname, $device_name, $info) = @_;

    $self->{bridge}->call(
        'restore_vm_volume_cleanup', { volname => "$volname", 'device-name' => "$device_name" },
    );
    $self->check_server("$volname $device_name", $device_name);
    return;
}

sub restore_container_init {
    my ($self, $volname, $storeid, $info) = @_;

    my $result = $self->{bridge}->call('restore_container_init', { volname => "$volname" });
    # An archive is a plain file, complete without Node; Node may have to serve the files of a directory.
    $self->note_server("$volname") if defined($result->{'archive-directory'});
    return { map { $_ => untaint($result->{$_}, 'path') } grep { defined($result->{$_}) }
            qw(tar-path archive-directory) };
}

sub restore_container_cleanup {
    my ($self, $volname, $storeid, $info) = @_;

    $self->{bridge}->call('restore_container_cleanup', { volname => "$volname" });
    $self->check_server("$volname", $volname);
    return;
}

# What a Node offers ends with that Node. Another Node knows nothing of it and reports no error, and qemu-img may have
# read an empty disk without an error, too.
sub note_server {
    my ($self, $what) = @_;

    $self->{servers}->{$what} = $self->{bridge}->node_pid();
    return;
}

sub check_server {
    my ($self, $what, $name) = @_;

    my $server = delete($self->{servers}->{$what}) // return;
    return if $server == ($self->{bridge}->node_pid() // 0);
    die "Cannot verify the restored \"" . one_line($name) . "\": the backup bridge that offered it ended"
        . " meanwhile; restore again\n";
}

1;
