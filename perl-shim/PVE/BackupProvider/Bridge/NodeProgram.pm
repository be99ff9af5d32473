# SPDX-License-Identifier: AGPL-3.0-or-later
# Finds Node and the bundle, and checks that this Node is new enough.
package PVE::BackupProvider::Bridge::NodeProgram;

use strict;
use warnings;

use constant DEFAULT_NODE => '/usr/bin/node';
use constant DEFAULT_BRIDGE => '/usr/share/pve-backup-host/bridge.mjs';
use constant OLDEST_NODE => '20.19';

# Returns (path of Node, path of the bundle), both untainted; dies if one of them is missing.
sub find {
    my $node = _program('PVE_BACKUP_HOST_NODE', DEFAULT_NODE);
    my $bridge = _program('PVE_BACKUP_HOST_BRIDGE', DEFAULT_BRIDGE);
    die "Cannot start Node.js: \"$node\" does not exist; install the package nodejs (@{[OLDEST_NODE]} or newer)\n"
        if !-x $node;
    die "Cannot start the backup bridge: \"$bridge\" does not exist; install the package pve-backup-host again\n"
        if !-e $bridge;
    return ($node, $bridge);
}

sub _program {
    my ($variable, $default) = @_;

    my $path = $ENV{$variable} // $default;
    my ($untainted) = $path =~ m!\A(/[A-Za-z0-9_./+\@:-]+)\z!;
    die "Cannot start Node.js: $variable is \"$path\", expected a plain absolute path\n"
        if !defined($untainted);
    return $untainted;
}

# Called only after a failed start: returns a sentence if Node is too old, else undef.
sub age_problem {
    my ($node) = @_;

    local %ENV = (PATH => '/usr/bin:/bin');
    open(my $fh, '-|', $node, '--version') or return undef;
    my $line = <$fh>;
    close($fh);
    return undef if !defined($line) || $line !~ m/^v?(([0-9]+)\.([0-9]+)\.[0-9]+)/;
    my ($version, $major, $minor) = ($1, $2, $3);
    my ($oldest_major, $oldest_minor) = split(/\./, OLDEST_NODE);
    return undef if $major > $oldest_major || ($major == $oldest_major && $minor >= $oldest_minor);
    return "Cannot start the backup bridge: Node.js is $version, expected @{[OLDEST_NODE]} or newer\n";
}

1;
