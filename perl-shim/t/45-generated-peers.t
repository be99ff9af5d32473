#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Generated peers: valid frames and valid answers with something wrong in them. Each becomes a message or a value of
# the right kind, or one sentence. No process is started: an object takes the place of the peer.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use JSON;
use Test::More;

use PVE::BackupProvider::Bridge::Framing;

use constant FRAME_CASES => 100_000;
use constant ANSWER_CASES => 100_000;
use constant SEED => 4711;

my $json = JSON->new->utf8->canonical->allow_nonref;
my @warnings;
local $SIG{__WARN__} = sub { push(@warnings, $_[0]) };

sub one_of { return $_[rand(@_)] }

# Replacements for a value, some of which no encoder would write.
my @TOKENS = (
    qw(null true false 0 -1 1.5 1e400 9007199254740993 99999999999999999999 01 [] {} [[]] [{}] {"a":{}} NaN),
    '""', '"x"', '"../../etc/passwd"', '"a\u0000b"', '"a\nb\u001b[31m"', '"\ud800"', "\"\xc3\xa4\"", "\"\xff\"",
    '"backup/100/qemu-1\n"', '"backup/0100/qemu-1"', '"/etc/passwd\n"', '"relative"', '"' . ('x' x 70000) . '"',
    ('[' x 600) . (']' x 600),
);

# The text of a copy of $value with one of its parts, at any depth, replaced by a token.
sub broken_text {
    my ($value) = @_;

    my $copy = $json->decode($json->encode($value));
    my @places = places(\$copy);
    ${ one_of(@places) } = 'TOKEN';
    my $token = one_of(@TOKENS);
    my $text = $json->encode($copy);
    $text =~ s/"TOKEN"/$token/;
    return $text;
}

# References to all parts of a value, the value itself first.
sub places {
    my ($place) = @_;

    my $value = $$place;
    my @below = ref($value) eq 'HASH' ? map { \$value->{$_} } sort keys %$value
        : ref($value) eq 'ARRAY' ? map { \$_ } @$value : ();
    return ($place, map { places($_) } @below);
}

# One line for the task log, none of Perl's own errors.
sub is_sentence {
    my ($text) = @_;

    return $text =~ m/\A[^\x00-\x1f\x7f]{1,4100}\n\z/ && $text !~ m/ at \S+ line \d+/;
}

# Frames

my @HEADERS = (
    sub { "Content-Length: $_[0]\r\n\r\n" },
    sub { "content-length:\t$_[0] \r\nContent-Type: x\r\n\r\n" },
    sub { "Content-Length: 1\r\nContent-Length: $_[0]\r\n\r\n" },
    sub { 'Content-Length: ' . ($_[0] + int(rand(3)) - 1) . "\r\n\r\n" },
    sub { "Content-Length: -1\r\n\r\n" },
    sub { "Content-Length: 1099511627776\r\n\r\n" },
    sub { "Content-Length: 268435457\r\n\r\n" },
    sub { "Content-Length: 18446744073709551616\r\n\r\n" },
    sub { "Content-Length: $_[0]\n\n" },
    sub { "Content-Type: x\r\n\r\n" },
    sub { ('x' x int(rand(9000))) . "\r\n\r\n" },
);
my $MESSAGE = { jsonrpc => '2.0', id => 7, result => { devices => { 'drive-scsi0' => { size => 4096 } } } };

sub generated_frames {
    my $bytes = '';
    for (1 .. 1 + int(rand(3))) {
        my $body = rand() < 0.5 ? $json->encode($MESSAGE) : broken_text($MESSAGE);
        my $header = $HEADERS[rand() < 0.7 ? 0 : rand(@HEADERS)];
        $bytes .= $header->(length($body)) . $body;
    }
    return $bytes if rand() < 0.6;
    my $at = int(rand(length($bytes)));
    my $way = int(rand(4));
    return substr($bytes, 0, $at) if $way == 0;
    substr($bytes, $at, 1) = chr(int(rand(256))) if $way == 1;
    substr($bytes, $at, 0) = substr($bytes, int(rand(length($bytes))), 1 + int(rand(20))) if $way == 2;
    substr($bytes, $at, 1 + int(rand(9))) = '' if $way == 3;
    return $bytes;
}

# A second, simple parser: (messages as text, whether something is wrong).
sub read_by_hand {
    my ($rest) = @_;

    my @messages;
    while ($rest =~ m/\A(.*?)\r\n\r\n/s) {
        my ($head, $start) = ($1, $+[0]);
        my @lengths = grep { defined } map { m/\Acontent-length:[ \t]*([0-9]{1,12})[ \t]*\z/i ? $1 : undef } split("\r\n", $head);
        return (\@messages, 1) if !@lengths || $lengths[-1] > 2**28;
        return (\@messages, 0) if length($rest) < $start + $lengths[-1];
        my $message = eval { JSON->new->utf8->decode(substr($rest, $start, $lengths[-1])) };
        return (\@messages, 1) if ref($message) ne 'HASH';
        push(@messages, $json->encode($message));
        $rest = substr($rest, $start + $lengths[-1]);
    }
    return (\@messages, length($rest) > 4096 ? 1 : 0);
}

srand(SEED);
my %seen;
my @wrong;
for my $case (1 .. FRAME_CASES) {
    my $bytes = generated_frames();
    my $framing = PVE::BackupProvider::Bridge::Framing->new();
    my $step = 1 + int(rand(length($bytes) / 3 + 1));
    my @messages;
    eval {
        for (my $at = 0; $at < length($bytes); $at += $step) {
            $framing->feed(substr($bytes, $at, $step));
            while (defined(my $message = $framing->next_message())) {
                push(@messages, $json->encode($message));
            }
        }
    };
    my $problem = $@;
    my ($wanted, $is_broken) = read_by_hand($bytes);
    my $is_right = join("\n", @messages) eq join("\n", @$wanted) && ($problem ne '' ? 1 : 0) == $is_broken;
    $is_right = 0 if $problem ne '' && !is_sentence($problem);
    push(@wrong, "case $case: $problem: " . substr($bytes, 0, 300)) if !$is_right;
    $seen{ $problem eq '' ? 'intact' : $problem =~ s/\d+/#/gr }++;
    $seen{'with messages'}++ if @messages;
}
is_deeply(\@wrong, [], FRAME_CASES . ' generated frames (seed ' . SEED . ') are read as a second reader reads them');
for my $kind (
    'intact', 'with messages', "a message is not valid JSON\n", "a message is not an object\n",
    "a header has no Content-Length\n", "a message of # bytes is too long\n", "there is no header in # bytes\n",
) {
    cmp_ok($seen{$kind} // 0, '>', 500, 'enough of them: ' . $kind =~ s/\n//r);
}

# Answers

# Takes the place of Node: answers each request with what the current case says.
package GeneratedPeer {
    our $answer;
    my $welcome = '{"result":{"protocol-version":' . PVE::BackupProvider::Bridge::PROTOCOL_VERSION() . '}}';
    sub new { return bless({ owner => $$, pid => 0, framing => PVE::BackupProvider::Bridge::Framing->new() }, shift) }
    sub send_message {
        my ($self, $message) = @_;
        return if !defined($message->{method}) || !defined($message->{id});
        my $text = $message->{method} eq 'initialize' ? $welcome : $answer;
        $text =~ s/\A\{/{"jsonrpc":"2.0","id":$message->{id},/;
        $self->{framing}->feed('Content-Length: ' . length($text) . "\r\n\r\n" . $text);
        return;
    }
    sub next_message {
        my ($self) = @_;
        my $message = eval { $self->{framing}->next_message() };
        chomp($self->{problem} = $@) if $@;
        return $message;
    }
    sub problem { return $_[0]->{problem} }
    sub step { $_[0]->{is_gone} = 1; return } # no more bytes will arrive
    sub is_gone { return $_[0]->{is_gone} }
    sub describe_end { return 'it ended' }
    sub stop { $_[0]->{is_gone} = 1; return }
}

my $plugin = 'PVE::Storage::Custom::BackupProviderDirExamplePlugin';
my $scfg = { type => $plugin->type(), path => '/nowhere', content => { backup => 1 } };
my $volname = 'backup/100/qemu-1700000000';
my $name = qr!\A[1-9][0-9]{2,8}/(?:qemu|lxc)-(?:0|[1-9][0-9]{0,11})\z!;
my $size = qr/\A[0-9]{1,16}\z/;
my $volume = {
    volname => $volname, vmid => 100, subtype => 'qemu', ctime => 1700000000, size => 4096,
    format => 'directory', protected => JSON::true, notes => "a\nb", parent => 'backup/100/qemu-1600000000',
};
sub is_path { return defined($_[0]) && !ref($_[0]) && $_[0] =~ m!\A/[^\x00-\x1f\x7f]*\z! }
sub is_text { return !defined($_[0]) || !ref($_[0]) }

# Name, what a valid Node answers, the call, and what PVE may be given.
my @calls = (
    ['job_init', undef, sub { $_[0]->job_init(1); 1 }, sub { 1 }],
    ['backup_init', { 'archive-name' => '100/qemu-1' }, sub { $_[0]->backup_init(100, 'qemu', 1) },
        sub { $_[0]->{'archive-name'} =~ m!\A[A-Za-z0-9.+=_/:-]+\z! && $_[0]->{'archive-name'} !~ m!(?:\A|/)\.{0,2}(?:/|\z)! }],
    ['backup_cleanup', { stats => { 'archive-size' => 5 } }, sub { $_[0]->backup_cleanup(100, 'qemu', 1, {}) },
        sub { $_[0]->{stats}->{'archive-size'} =~ $size }],
    ['backup_get_mechanism', { mechanism => 'nbd' }, sub { scalar($_[0]->backup_get_mechanism(100, 'qemu')) },
        sub { $_[0] =~ m/\A[a-z-]+\z/ }],
    ['backup_vm_query_incremental', { devices => { 'drive-scsi0' => 'use', 'drive-scsi1' => 'new' } },
        sub { $_[0]->backup_vm_query_incremental(100, { 'drive-scsi0' => { size => 1 } }) },
        sub { !grep { !m/\A(?:new|use|none)\z/ } values(%{ $_[0] }) }],
    ['restore_get_mechanism', { mechanism => 'qemu-img', vmtype => 'qemu' },
        sub { [$_[0]->restore_get_mechanism($volname)] },
        sub { @{ $_[0] } == 2 && $_[0]->[0] =~ m/\A[a-z-]+\z/ && $_[0]->[1] =~ m/\A(?:qemu|lxc)\z/ }],
    ['archive_get_guest_config', { data => 'bmFtZTogeAo=' }, sub { $_[0]->archive_get_guest_config($volname) },
        sub { !ref($_[0]) }],
    ['archive_get_firewall_config', { data => undef }, sub { $_[0]->archive_get_firewall_config($volname) // '' },
        sub { !ref($_[0]) }],
    ['restore_vm_init', { devices => { 'drive-scsi0' => { size => 4096 } } }, sub { $_[0]->restore_vm_init($volname) },
        sub { my $d = $_[0]; !grep { !m/\A[\w.-]{1,64}\z/ || $d->{$_}->{size} !~ $size } keys(%$d) }],
    ['restore_vm_volume_init', { 'qemu-img-path' => '/run/x/drive-scsi0.raw' },
        sub { $_[0]->restore_vm_volume_init($volname, 'drive-scsi0', {}) }, sub { is_path($_[0]->{'qemu-img-path'}) }],
    ['restore_container_init', { 'tar-path' => '/x/archive.tar' }, sub { $_[0]->restore_container_init($volname) },
        sub { my $offer = $_[0]; !grep { !is_path($_) } values(%$offer) }],
    ['list_volumes', { volumes => [$volume, { %$volume, volname => 'backup/101/lxc-0', subtype => 'lxc' }] },
        sub { $plugin->list_volumes('bk', $scfg, undef, ['backup']) },
        sub { !grep { $_->{volid} !~ m/\Abk:backup\/(.*)\z/s || $1 !~ $name || $_->{size} !~ $size || !is_text($_->{notes}) } @{ $_[0] } }],
    ['volume_size_info', { size => 1, used => 1, format => 'directory' },
        sub { [$plugin->volume_size_info($scfg, 'bk', $volname)] }, sub { $_[0]->[0] =~ $size && $_[0]->[2] =~ $size }],
    ['prune_backups', { backups => [{ volname => $volname, vmid => 100, type => 'qemu', ctime => 1700000000, mark => 'keep' }] },
        sub { $plugin->prune_backups($scfg, 'bk', { 'keep-last' => 1 }, 100, 'qemu', 1, undef) },
        sub { !grep { $_->{volid} !~ m/\Abk:backup\/(.*)\z/s || $1 !~ $name || $_->{mark} !~ m/\A(?:keep|remove|protected)\z/ } @{ $_[0] } }],
    ['get_volume_attribute', { value => 'notes' }, sub { $plugin->get_volume_attribute($scfg, 'bk', $volname, 'notes') // '' },
        sub { !ref($_[0]) }],
);

no warnings qw(redefine once);
local *PVE::BackupProvider::Bridge::NodeProgram::find = sub { return ('/usr/bin/node', '/bridge.mjs') };
local *PVE::BackupProvider::Bridge::Process::spawn = sub { return GeneratedPeer->new() };
use warnings;

# The whole answer without its id: a result, an error, or both.
sub generated_answer {
    my ($result) = @_;

    my $way = rand();
    return $json->encode({ result => $result }) if $way < 0.1;
    return broken_text({ result => $result }) if $way < 0.7;
    return broken_text({ error => { code => -32031, message => "no such\nbackup", data => { code => 'X', hint => 'look' } } })
        if $way < 0.95;
    return broken_text({ error => { code => 1 }, result => $result, method => 'log', params => { level => 'info', message => 'x' } });
}

srand(SEED);
%seen = ();
@wrong = ();
for my $case (1 .. ANSWER_CASES) {
    my ($what, $result, $call, $is_sound) = @{ one_of(@calls) };
    $GeneratedPeer::answer = generated_answer($result);
    my ($provider) = BridgeTest::provider();
    my $value = eval { $call->($provider) };
    my $problem = $@;
    my $is_right = $problem ne '' ? is_sentence($problem) : $is_sound->($value);
    # Where an object is taken for text, its Perl name shows.
    $is_right = 0 if ($problem . $json->encode([$value])) =~ m/(?:HASH|ARRAY)[(]0x/;
    push(@wrong, "case $case, $what: $problem: " . substr($GeneratedPeer::answer, 0, 300)) if !$is_right;
    $seen{ $problem eq '' ? "$what answers" : $problem =~ s/"[^"]*"/"..."/gr }++;
}
is_deeply(\@wrong, [], ANSWER_CASES . ' generated answers (seed ' . SEED . ') become a sound value or one sentence');
cmp_ok($seen{"$_->[0] answers"} // 0, '>', 500, "enough of them: $_->[0] answers") for @calls;
for my $kind (
    'Cannot use the answer of the backup bridge: it is not an object',
    'Cannot use the answer of the backup bridge: "..." is not an object',
    'Cannot use the answer of the backup bridge: "..." is not a list',
    'Cannot use the answer of the backup bridge: "..." is not a valid number',
    'Cannot talk to the backup bridge: a message is not valid JSON',
    'no such backup; look',
    'the backup bridge gave an error without a message; look',
) {
    cmp_ok($seen{"$kind\n"} // 0, '>', 100, "enough of them: $kind");
}
is_deeply(\@warnings, [], 'and nothing warns');
diag(join('', map { "$seen{$_} $_" . (m/\n\z/ ? '' : "\n") } sort { $seen{$b} <=> $seen{$a} } keys(%seen))) if $ENV{SHOW_SEEN};

done_testing();
