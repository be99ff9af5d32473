# SPDX-License-Identifier: AGPL-3.0-or-later
# JSON-RPC messages with Content-Length framing: bytes in, messages out, no input or output.
package PVE::BackupProvider::Bridge::Framing;

use strict;
use warnings;

use JSON;

# A list of a hundred thousand backups stays below this.
use constant MAX_MESSAGE_BYTES => 256 * 1024 * 1024;
use constant MAX_HEADER_BYTES => 4096;

my $json = JSON->new->utf8->canonical->allow_nonref;

sub new {
    my ($class) = @_;

    return bless({ buffer => '' }, $class);
}

# The message as bytes to send.
sub encode_message {
    my ($message) = @_;

    my $body = $json->encode({ jsonrpc => '2.0', %$message });
    return 'Content-Length: ' . length($body) . "\r\n\r\n" . $body;
}

# Takes bytes as they arrive, in pieces of any size.
sub feed {
    my ($self, $bytes) = @_;

    $self->{buffer} .= $bytes;
    return;
}

# Returns the next complete message, or undef while bytes are missing; dies if they are not a message.
sub next_message {
    my ($self) = @_;

    if (!defined($self->{body_length})) {
        my $end = index($self->{buffer}, "\r\n\r\n");
        if ($end < 0) {
            die "there is no header in " . length($self->{buffer}) . " bytes\n"
                if length($self->{buffer}) > MAX_HEADER_BYTES;
            return undef;
        }
        $self->{body_length} = _parse_header(substr($self->{buffer}, 0, $end + 4, ''));
    }
    return undef if length($self->{buffer}) < $self->{body_length};

    my $body = substr($self->{buffer}, 0, delete($self->{body_length}), '');
    my $message = eval { $json->decode($body) };
    die "a message is not valid JSON\n" if $@;
    die "a message is not an object\n" if ref($message) ne 'HASH';
    return $message;
}

sub _parse_header {
    my ($header) = @_;

    my $length;
    for my $line (split(/\r\n/, $header)) {
        $length = $1 if $line =~ m/\AContent-Length:[ \t]*([0-9]{1,12})[ \t]*\z/i;
    }
    die "a header has no Content-Length\n" if !defined($length);
    die "a message of $length bytes is too long\n" if $length > MAX_MESSAGE_BYTES;
    return int($length);
}

1;
