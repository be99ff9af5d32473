#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Text on its way to the task log and to Node: on one line, as bytes or as characters, cut between characters.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use JSON;
use Scalar::Util qw(tainted);
use Test::More;

use PVE::BackupProvider::Bridge::Values qw(one_line line_for_json plain_data shown error_sentence text_for_json);
use PVE::Storage::Common;

# One line

my $nothing = substr($^X, 0, 0);
for my $case (
    ['plain text', 'a b', 'a b'],
    ['lines', " a\n\r\tb\n", 'a b'],
    ['escape sequences', "a\e[31mb\x7f\0c", 'a [31mb c'],
    ['the terminal\'s 8 bit controls, as characters', "a\x{9b}31m\x{85}b\x{20ac}", "a 31m b\xe2\x82\xac"],
    ['line separators, as characters', "a\x{2028}b\x{2029}\x{2028}c", 'a b c'],
    ['at the end', "a\x{2028}", 'a'],
    ['both, as bytes of UTF-8', "a\xc2\x9b31m\xc2\x85b\xe2\x80\xa8c\xe2\x80\xa9", 'a 31m b c'],
    ['from JSON', decode_json('["a\u0085\u2028b"]')->[0], 'a b'],
    ['neighbours of what is folded', "\x{a0}a\x{a1}\x{2027}\x{202a}\x{c5}\x{e0}", "a\xc2\xa1\xe2\x80\xa7\xe2\x80\xaa\xc3\x85\xc3\xa0"],
    ['characters with such bytes in them', "\xc3\x85\xc3\xa0\xe2\x80\xa6\xe5\x80\xa8", "\xc3\x85\xc3\xa0\xe2\x80\xa6\xe5\x80\xa8"],
    ['bytes that are no UTF-8', "caf\xe9 \x85\n\x9b", "caf\xe9 \x85 \x9b"],
    ['cut UTF-8', "a\xe2\x80", "a\xe2\x80"],
) {
    my ($what, $text, $expected) = @$case;
    my $line = one_line($text);
    is($line, $expected, $what);
    ok(!utf8::is_utf8($line), 'in bytes');
    is(one_line($line), $line, 'a line stays one');
    my $before = $text;
    ok(tainted(one_line("$text$nothing")), 'and tainted');
    is($text, $before, 'and what it was made of stays');
}

# For Node

for my $text ("Ger\xc3\xa4t \xe2\x82\xac\n", "Ger\x{e4}t \x{20ac}\n") {
    is(encode_json([line_for_json($text)]), "[\"Ger\xc3\xa4t \xe2\x82\xac\"]", 'bytes and characters arrive alike');
}
for my $text ("/d\xc3\xa4t\xc3\xa4\n", "/d\x{e4}t\x{e4}\n") {
    utf8::upgrade($text) if $text !~ m/\xc3/;
    my $before = $text;
    is(encode_json([text_for_json($text)]), "[\"/d\xc3\xa4t\xc3\xa4\\n\"]", 'a value of PVE\'s, too, with all it holds');
    is(encode_json(plain_data({ a => [$text, 7, undef] })), "{\"a\":[\"/d\xc3\xa4t\xc3\xa4\\n\",7,null]}", 'at any depth');
    is($text, $before, 'and what it was made of stays');
}
is(encode_json([text_for_json("/caf\xe9")]), "[\"/caf\xc3\xa9\"]", 'what is no UTF-8 is Latin-1');
is(encode_json([line_for_json("Ger\xe4t")]), "[\"Ger\xc3\xa4t\"]", 'and what is no UTF-8');
{
    BridgeTest::use_fake_bridge();
    my ($provider, $log) = BridgeTest::provider();
    $provider->backup_cleanup(100, 'qemu', 0, { error => "Ger\xc3\xa4t fehlt\n" });
    is($log->[0], "info: backup_cleanup 100 qemu false Ger\xc3\xa4t fehlt", 'an error of PVE\'s comes back as it was');

    no warnings 'redefine';
    local *PVE::Storage::Common::deallocate = sub { die "Ger\xc3\xa4t fehlt\n" };
    ($provider) = BridgeTest::provider('test-behaviour' => 'file-handle');
    open(my $handle, '<', '/dev/null') or die;
    my @regions = ([0, 1]);
    my $volume = {
        size => 1, 'bitmap-mode' => 'none', 'file-handle' => $handle,
        'next-dirty-region' => sub { return @{ shift(@regions) // [] } },
    };
    like(BridgeTest::failure(sub { $provider->backup_vm(100, 'x', { 'drive-scsi0' => $volume }, {}) }),
        qr/: Ger\xc3\xa4t fehlt$/, 'and one in the middle of a call');
}

# What is shown

is(shown("a\nb"), 'a b', 'a short value is shown');
is(shown('x' x 1000), 'x' x 200, 'of a long one the beginning');
is(shown('xx' . "\x{20ac}" x 1000), 'xx' . "\xe2\x82\xac" x 198, 'not half a character');
is(shown('x' . "\xff" x 1000), 'x' . "\xff" x 199, 'whatever the bytes are');
is(shown($_), '', 'nothing of what is no text') for undef, [], {};
is(length(error_sentence({ message => "\x{20ac}" x 5000 })), 3 * 4000 + 1, 'a sentence has an end');
my $plugin = 'PVE::Storage::Custom::BackupProviderDirExamplePlugin';
is(BridgeTest::failure(sub { $plugin->parse_volname("a\x{85}\x{2028}" . "\x{20ac}" x 1000) }),
    'Cannot use the volume name "a ' . "\xe2\x82\xac" x 198 . "\": expected backup/<vmid>/<qemu or lxc>-<time>\n",
    'the name of a volume, too');

done_testing();
