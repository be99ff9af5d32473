# SPDX-License-Identifier: AGPL-3.0-or-later
# What root of the host opens for the Node that reads a container, perhaps in its user namespace: the
# archive, and the connection to the Node that owns the store. It gets these two handles and no path.
package PVE::BackupProvider::Bridge::Handoff;

use strict;
use warnings;

use Fcntl qw(F_GETFD F_SETFD FD_CLOEXEC O_NONBLOCK O_RDWR);
use IO::Socket::UNIX;
use JSON;
use Socket qw(SOCK_STREAM);

# Opens the archive and takes the one connection that the socket accepts. The archive's path is
# /proc/<pid>/fd/<number> of the Node that owns the store: it leads to the file which that one holds, whatever
# has the file's name by now, or that of a folder above it. Dies with one sentence.
sub take {
    my ($class, $archive_path, $socket_path, $token) = @_;

    # Both are closed on exec, as every handle of Perl's above 2: no other program gets them.
    sysopen(my $archive, $archive_path, O_RDWR | O_NONBLOCK)
        or die "Cannot open the archive \"$archive_path\": $!\n";
    die "Cannot open the archive \"$archive_path\": it is not a regular file\n" if !-f $archive;
    my $socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $socket_path)
        or die "Cannot hand the archive over: the backup bridge is ending or gone (\"$socket_path\": $!)\n";
    my $line = encode_json({ token => $token }) . "\n";
    local $SIG{PIPE} = 'IGNORE';
    my $written = syswrite($socket, $line) // 0;
    die "Cannot hand the archive over: the backup bridge did not take the token\n" if $written != length($line);
    return bless({ archive => $archive, socket => $socket }, $class);
}

# Before that Node starts: from now on programs inherit the handles. Returns the params that tell their
# numbers.
sub inheritable {
    my ($self) = @_;

    for my $handle (@$self{qw(archive socket)}) {
        my $flags = fcntl($handle, F_GETFD, 0) // die "Cannot hand the archive over: $!\n";
        fcntl($handle, F_SETFD, $flags & ~FD_CLOEXEC) // die "Cannot hand the archive over: $!\n";
    }
    return { 'archive-fd' => fileno($self->{archive}), 'handoff-fd' => fileno($self->{socket}) };
}

sub close {
    my ($self) = @_;

    CORE::close($_) for grep { defined } delete(@$self{qw(archive socket)});
    return;
}

1;
