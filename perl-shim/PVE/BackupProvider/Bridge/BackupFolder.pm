# SPDX-License-Identifier: AGPL-3.0-or-later
# The directory that a storage section names: whether it exists, whether it is mounted, how full it is. Everything
# that touches it runs in a child that is killed after a few seconds: a share whose server hangs must not stop
# pvestatd.
package PVE::BackupProvider::Bridge::BackupFolder;

use strict;
use warnings;

use Cwd ();
use Errno qw(EBADF EEXIST EINVAL ENOENT EROFS);
use Fcntl qw(O_DIRECTORY O_NOFOLLOW O_RDONLY);
use IO::Handle;

use PVE::JSONSchema;
use PVE::ProcFSTools;
use PVE::Tools;

use constant TIMEOUT_SECONDS => 2;
# Backups contain secrets.
use constant FOLDER_MODE => 0700;

# Makes sure that the directory can be used; creates it, but never its parents. Dies with one sentence.
sub activate {
    my ($storeid, $scfg) = @_;

    my $path = $scfg->{path};
    my $failed = "Cannot activate the storage \"$storeid\"";
    my $state = inspect($scfg);
    die "$failed: \"$path\" did not answer within @{[TIMEOUT_SECONDS]} seconds, is its server reachable?\n"
        if !$state;
    die "$failed: \"$state->{'mount-point'}\" must be a mount point, but nothing is mounted there\n"
        if !$state->{'is-mounted'};
    return if $state->{'is-folder'};
    die "$failed: \"$path\" is not a directory\n" if $state->{exists};
    die "$failed: \"$path\" does not exist, and create-base-path is off\n"
        if !($scfg->{'create-base-path'} // 1);

    my ($result) = PVE::Tools::run_fork_with_timeout(TIMEOUT_SECONDS, sub { return create($path) });
    $result //= 'it did not answer';
    die "$failed: cannot create \"$path\": $result\n" if $result ne 'ok';
    return;
}

# (total, available, used, active) in bytes; undef while the directory cannot be used. Never dies.
sub status {
    my ($storeid, $scfg) = @_;

    my $state = eval { inspect($scfg) };
    return undef if !$state || !$state->{'is-mounted'} || !$state->{'is-folder'};
    my $space = eval { PVE::Tools::df($scfg->{path}, TIMEOUT_SECONDS) };
    return undef if !$space || !$space->{total};
    return ($space->{total}, $space->{avail}, $space->{used}, 1);
}

# What is at the path; undef if there was no answer in time.
sub inspect {
    my ($scfg) = @_;

    my $path = $scfg->{path};
    my $mount_point = mount_point($scfg);
    # List context: a timeout is then a result, not a warning.
    my ($state) = PVE::Tools::run_fork_with_timeout(
        TIMEOUT_SECONDS,
        sub {
            my $is_mounted = !defined($mount_point) || is_mounted($mount_point);
            return {
                'is-mounted' => $is_mounted ? 1 : 0,
                'is-folder' => -d $path ? 1 : 0,
                exists => -e $path ? 1 : 0,
            };
        },
    );
    return undef if !$state;
    $state->{'mount-point'} = $mount_point;
    return $state;
}

# The path that must be a mount point, if there is one: is_mountpoint is a boolean or such a path.
sub mount_point {
    my ($scfg) = @_;

    my $value = $scfg->{is_mountpoint};
    return undef if !defined($value);
    my $is_yes = PVE::JSONSchema::parse_boolean($value);
    return $value if !defined($is_yes);
    return $is_yes ? $scfg->{path} : undef;
}

sub is_mounted {
    my ($mount_point) = @_;

    my $real = Cwd::realpath($mount_point);
    return 0 if !defined($real);
    return scalar(grep { $_->[1] eq $real } @{ PVE::ProcFSTools::parse_proc_mounts() });
}

# 'ok', or why the last part of the path could not be created. Walks down to its parent directory, from one handle to
# the next and through no link: on a share that others write to, a link could lead anywhere on this node. Changes the
# working directory: for a child process only.
sub create {
    my ($path) = @_;

    my @names = grep { $_ ne '' && $_ ne '.' } split(m!/!, $path);
    my $name = pop(@names) // return 'it is the root directory';
    my $above = '';
    my $handle = open_folder('/') or return "$!";
    for my $part (@names) {
        chdir($handle) or return "$!";
        my $next = open_folder($part);
        $above .= "/$part";
        if (!$next) {
            my $error = $!;
            return "\"$above\" is a symbolic link: create the directory yourself" if -l $part;
            return 'the directory above it does not exist, and only the last part of the path is ever created'
                if $error == ENOENT;
            return "\"$above\": $error";
        }
        $handle = $next;
    }
    chdir($handle) or return "$!";
    if (!mkdir($name, FOLDER_MODE)) {
        return 'the file system is read-only' if $! == EROFS;
        return "$!" if $! != EEXIST;
        return "\"$path\" is a symbolic link: create the directory yourself" if -l $name;
        return 'it already exists and is not a directory' if !-d _;
    }
    # Otherwise a power cut could take the new directory away, with everything stored in it. Some file systems cannot
    # sync a directory, and say so.
    return "the directory above it cannot be synced: $!" if !$handle->sync() && $! != EINVAL && $! != EBADF;
    return 'ok';
}

sub open_folder {
    my ($name) = @_;

    sysopen(my $handle, $name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW) or return undef;
    return $handle;
}

1;
