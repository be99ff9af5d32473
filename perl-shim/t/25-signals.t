#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Code that runs without signals gets none, and nothing that happens meanwhile leaves them held back.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use POSIX ();
use Test::More;

use PVE::BackupProvider::Bridge::Signals qw(without_signals);

my $handled = 0;
local $SIG{USR1} = sub { $handled++ };

# Are signals delivered at once again?
sub are_delivered {
    my $before = $handled;
    kill('USR1', $$);
    return $handled == $before + 1;
}

ok(are_delivered(), 'a signal is delivered');
my @result = without_signals(sub { kill('USR1', $$); return ('one', $handled) });
is_deeply(\@result, ['one', 1], 'not to what runs without them, which returns a list');
is($handled, 2, 'but afterwards');
is(scalar(without_signals(sub { return 'one' })), 'one', 'or one value');
ok(are_delivered(), 'afterwards they are as they were');

is(BridgeTest::failure(sub { without_signals(sub { die "of its own\n" }) }), "of its own\n", 'it may die');
ok(are_delivered(), 'they are as they were');

local $SIG{TERM} = sub { die "interrupted by signal\n" };
my $is_through = 0;
my $interrupted = sub { without_signals(sub { kill('TERM', $$); $is_through = 1 }) };
is(BridgeTest::failure($interrupted), "interrupted by signal\n", 'a handler that dies does so afterwards');
ok($is_through, 'so that nothing is torn apart');
is(BridgeTest::failure($interrupted), "interrupted by signal\n", 'every time');
ok(are_delivered(), 'they are as they were');

$handled = 0;
without_signals(sub {
    without_signals(sub { kill('USR1', $$) });
    is($handled, 0, 'one within another delivers nothing');
});
is($handled, 1, 'the outer one does');

my $mask = POSIX::SigSet->new();
POSIX::sigprocmask(POSIX::SIG_BLOCK(), POSIX::SigSet->new(POSIX::SIGUSR2()));
without_signals(sub { 1 });
POSIX::sigprocmask(POSIX::SIG_SETMASK(), POSIX::SigSet->new(), $mask);
ok($mask->ismember(POSIX::SIGUSR2()), 'what the caller held back is still held back');

done_testing();
