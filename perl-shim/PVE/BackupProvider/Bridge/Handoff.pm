# SPDX-License-Identifier: AGPL-3.0-or-later
# What root on the host opens for the Node that reads a container, perhaps in the container's user namespace: files
# and connections, as the provider requested them. That Node gets these handles and no paths.
package PVE::BackupProvider::Bridge::Handoff;

use strict;
use warnings;

use Fcntl qw(F_GETFD F_SETFD FD_CLOEXEC O_NONBLOCK O_RDWR);
use IO::Socket::UNIX;
use Socket qw(SOCK_STREAM);

# Opens what each entry of @$wanted describes: { kind => 'file', path } with a path /proc/<pid>/fd/<number>, which
# leads to the file that this process holds, whatever has the file's name, or that of a directory above it, by now; or
# { kind => 'socket', path, line } with the line to send first. Dies with one sentence.
sub take {
    my ($class, $wanted) = @_;

    # All of them are closed on exec, like every Perl handle above 2: no other program gets them.
    return bless({ handles => [map { $_->{kind} eq 'file' ? open_file($_) : connect_to($_) } @$wanted] }, $class);
}

sub open_file {
    my ($wanted) = @_;

    my $path = $wanted->{path};
    sysopen(my $file, $path, O_RDWR | O_NONBLOCK)
        or die "Cannot open \"$path\" for the container's backup: $!\n";
    die "Cannot open \"$path\" for the container's backup: it is not a regular file\n" if !-f $file;
    return $file;
}

sub connect_to {
    my ($wanted) = @_;

    my $path = $wanted->{path};
    my $socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path)
        or die "Cannot connect to \"$path\" for the container's backup: the backup bridge is ending or gone ($!)\n";
    return $socket if !defined($wanted->{line});
    my $line = "$wanted->{line}\n";
    local $SIG{PIPE} = 'IGNORE';
    my $written = syswrite($socket, $line) // 0;
    die "Cannot connect to \"$path\" for the container's backup: the backup bridge did not take the first line\n"
        if $written != length($line);
    return $socket;
}

# Called before that Node starts: from now on programs inherit the handles. Returns their numbers, in order.
sub inheritable {
    my ($self) = @_;

    for my $handle (@{ $self->{handles} }) {
        my $flags = fcntl($handle, F_GETFD, 0) // die "Cannot hand over the container's handles: $!\n";
        fcntl($handle, F_SETFD, $flags & ~FD_CLOEXEC) // die "Cannot hand over the container's handles: $!\n";
    }
    return [map { int(fileno($_)) } @{ $self->{handles} }];
}

sub close {
    my ($self) = @_;

    CORE::close($_) for splice(@{ $self->{handles} });
    return;
}

1;
