# SPDX-License-Identifier: AGPL-3.0-or-later
# Values on their way between Perl and JSON: numbers that are really numbers, bytes as base64, text for the task log,
# and results untainted by a pattern.
package PVE::BackupProvider::Bridge::Values;

use strict;
use warnings;

use JSON;
use MIME::Base64 ();

use base qw(Exporter);

our @EXPORT_OK = qw(
    encode_bytes decode_bytes number numbers_in plain_data text_for_json one_line line_for_json shown error_sentence
    untaint untainted_size object_in list_in
);

# PVE's own rule, without empty parts, "." and "..". Each storage plugin has a stricter one.
use constant ARCHIVE_NAME => qr{(?!(?:.*/)?\.{0,2}(?:/|\z))[A-Za-z0-9.+=_/:-]{1,248}};

# The most that the task log quotes from another program's output.
use constant MAX_SHOWN_CHARS => 200;
use constant MAX_SENTENCE_CHARS => 4000;

# One pattern per kind of result from which PVE builds paths, commands or names.
use constant PATTERNS => {
    'archive name' => qr!\A(@{[ARCHIVE_NAME]})\z!,
    'volume name' => qr!\A(backup/@{[ARCHIVE_NAME]})\z!,
    'device name' => qr!\A([A-Za-z0-9][A-Za-z0-9._-]{0,63})\z!,
    mechanism => qr!\A([a-z-]{1,20})\z!,
    'guest type' => qr!\A(qemu|lxc)\z!,
    mode => qr!\A(new|use|none)\z!,
    'bitmap name' => qr!\A([A-Za-z0-9._:-]{1,1023})\z!,
    'handle path' => qr!\A(/proc/[1-9][0-9]{0,9}/fd/[0-9]{1,9})\z!,
    path => qr!\A(/[^\x00-\x1f\x7f]{0,4095})\z!,
    format => qr!\A([a-z][a-z0-9._-]{0,19})\z!,
    mark => qr!\A(keep|remove|protected)\z!,
    'kind of handle' => qr!\A(file|socket)\z!,
    'first line' => qr!\A([ -~]{0,4096})\z!,
    number => qr!\A([0-9]{1,16})\z!,
    base64 => qr!\A([A-Za-z0-9+/]*={0,2})\z!,
    text => qr!\A(.*)\z!s,
};

sub encode_bytes {
    my ($bytes) = @_;

    my $copy = $bytes;
    utf8::encode($copy) if !utf8::downgrade($copy, 1);
    return MIME::Base64::encode_base64($copy, '');
}

sub decode_bytes {
    my ($base64) = @_;

    return MIME::Base64::decode_base64($base64);
}

# JSON distinguishes numbers from strings; Perl does not show which of them a value is.
sub number {
    my ($value, $what) = @_;

    die "Cannot use $what: it is missing\n" if !defined($value);
    my ($digits) = $value =~ m/\A([0-9]{1,16})\z/; # the capture is not tainted
    die "Cannot use $what: \"" . one_line($value) . "\" is not a number\n" if !defined($digits);
    return int($digits);
}

# A copy of \%hash in which the keys named, where present and defined, are numbers.
sub numbers_in {
    my ($hash, @keys) = @_;

    my $copy = { %{ $hash // {} } };
    for my $key (@keys) {
        if (defined($copy->{$key})) {
            $copy->{$key} = number($copy->{$key}, $key);
        } else {
            delete($copy->{$key});
        }
    }
    return $copy;
}

# PVE reads its configuration as bytes, and JSON consists of characters: returns $value as characters. What is not
# UTF-8 stays, as Latin-1; a number stays a number.
sub text_for_json {
    my ($value) = @_;

    my $copy = $value; # a match would turn a number into text
    return $value if !defined($copy) || utf8::is_utf8($copy) || $copy !~ m/[\x80-\xff]/;
    utf8::decode($copy);
    return $copy;
}

# A deep copy without code, handles and objects, none of which can be sent; text as characters.
sub plain_data {
    my ($value) = @_;

    my $ref = ref($value);
    return text_for_json($value) if !$ref;
    return [map { plain_data($_) } @$value] if $ref eq 'ARRAY';
    return undef if $ref ne 'HASH';
    my $copy = {};
    for my $key (keys %$value) {
        my $kind = ref($value->{$key});
        next if $kind && $kind ne 'HASH' && $kind ne 'ARRAY';
        $copy->{$key} = plain_data($value->{$key});
    }
    return $copy;
}

# Text for the task log: one line, no control characters, UTF-8 bytes. Removes the same characters as oneLine() on the
# TypeScript side: those from U+0080 on, U+2028 and U+2029, too. Bytes that are not UTF-8 have no known meaning.
sub one_line {
    my ($text) = @_;

    my $line = "$text";
    my $is_utf8 = utf8::is_utf8($line) || utf8::decode($line);
    my $folded = $is_utf8 ? qr/[\p{Cc}\x{2028}\x{2029}]+/ : qr/[\x00-\x1f\x7f]+/;
    $line =~ s/^\s+//;
    $line =~ s/\s+$//;
    $line =~ s/$folded/ /g;
    utf8::encode($line) if $is_utf8;
    return $line;
}

# The same as characters, of which JSON consists.
sub line_for_json {
    my ($text) = @_;

    my $line = one_line($text);
    utf8::decode($line); # what is not UTF-8 stays, as Latin-1
    return $line;
}

# The part of a line that is shown of a wrong value; empty for anything that is not text.
sub shown {
    my ($value) = @_;

    return cut(text_of($value), MAX_SHOWN_CHARS);
}

# The first $chars characters of UTF-8 bytes; a byte that does not belong to a character counts as one.
sub cut {
    my ($bytes, $chars) = @_;

    $bytes =~ m/\A(?:[\xc2-\xf4][\x80-\xbf]{1,3}|.){0,$chars}/s;
    return substr($bytes, 0, $+[0]);
}

# The text to die with for an error answer: message and hint, one line.
sub error_sentence {
    my ($error) = @_;

    my $is_hash = ref($error) eq 'HASH';
    my $message = $is_hash ? text_of($error->{message}) : '';
    $message = 'the backup bridge gave an error without a message' if $message eq '';
    my $data = $is_hash && ref($error->{data}) eq 'HASH' ? $error->{data} : {};
    my $hint = text_of($data->{hint});
    my $sentence = $hint ne '' ? "$message; $hint" : $message;
    return cut($sentence, MAX_SENTENCE_CHARS) . "\n";
}

# One line of what should be text; empty for everything else.
sub text_of {
    my ($value) = @_;

    return defined($value) && !ref($value) ? one_line($value) : '';
}

# The sentence for an answer that is not as expected.
sub unusable {
    my ($why) = @_;

    return "Cannot use the answer of the backup bridge: $why\n";
}

# $value, if it is an object; otherwise Perl would report an error that names a line of code.
sub object_in {
    my ($value, $what) = @_;

    return $value if ref($value) eq 'HASH';
    die unusable("$what is not an object");
}

sub list_in {
    my ($value, $what) = @_;

    return $value if ref($value) eq 'ARRAY';
    die unusable("$what is not a list");
}

# $value untainted; dies if it is not of the given kind.
sub untaint {
    my ($value, $kind) = @_;

    my $pattern = PATTERNS->{$kind} or die "there is no pattern for $kind\n";
    my ($clean) = defined($value) && !ref($value) ? $value =~ $pattern : ();
    die unusable('"' . shown($value) . "\" is not a valid $kind") if !defined($clean);
    return $clean;
}

sub untainted_size {
    my ($value) = @_;

    return int(untaint($value, 'number'));
}

1;
