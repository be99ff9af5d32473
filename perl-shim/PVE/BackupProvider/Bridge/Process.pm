# SPDX-License-Identifier: AGPL-3.0-or-later
# One Node process: started without a shell, connected by three pipes, ended and reaped in bounded time. Passes
# messages on without knowing what they mean.
package PVE::BackupProvider::Bridge::Process;

use strict;
use warnings;

use Errno qw(EAGAIN EINTR);
use Fcntl qw(F_GETFL F_SETFL O_NONBLOCK);
use POSIX qw(:signal_h WNOHANG);
use Scalar::Util qw(tainted);
use Time::HiRes qw(time);

use PVE::BackupProvider::Bridge::Framing;
use PVE::BackupProvider::Bridge::Signals qw(without_signals);

use constant READ_BYTES => 256 * 1024;
use constant MAX_STDERR_LINE => 4096;
# Also limits the delay before a signal is noticed that arrives just before select().
use constant MAX_SELECT_SECONDS => 1;
our $TERM_SECONDS = 3;

# Not from Config: that reads a file when queried, and the child of a container's backup may not be allowed to.
my %signal_name = map { (POSIX->can($_)->() => $_) } qw(
    SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV SIGUSR2 SIGPIPE SIGALRM SIGTERM
    SIGXCPU SIGXFSZ SIGSYS
);

# Starts `$node $bridge`; $on_stderr gets each line. Dies if Node cannot be started.
sub spawn {
    my ($class, $node, $bridge, $on_stderr) = @_;

    my ($child_in, $in) = _pipe();
    my ($out, $child_out) = _pipe();
    my ($err, $child_err) = _pipe();
    my ($status, $child_status) = _pipe();

    # The caller's signal handlers must not run in the child: they would unwind there.
    my ($pid, $fork_error) = without_signals(sub {
        my $child = fork();
        if (defined($child) && $child == 0) {
            eval { _exec_child($node, $bridge, $child_in, $child_out, $child_err) };
            my $reason = $@;
            syswrite($child_status, $reason);
            POSIX::_exit(127);
        }
        return ($child, "$!");
    });
    die "Cannot start Node.js: fork failed, $fork_error\n" if !defined($pid);

    close($_) for $child_in, $child_out, $child_err, $child_status;
    my $self = bless(
        {
            pid => $pid,
            owner => $$,
            in => $in,
            out => $out,
            err => $err,
            to_send => '',
            framing => PVE::BackupProvider::Bridge::Framing->new(),
            messages => [],
            on_stderr => $on_stderr,
            stderr => '',
            last_stderr => '',
        },
        $class,
    );
    for my $handle ($in, $out, $err) {
        my $flags = fcntl($handle, F_GETFL, 0) // 0;
        fcntl($handle, F_SETFL, $flags | O_NONBLOCK);
    }
    # Ends when exec() closes the pipe, or with the reason why exec() failed.
    my $reason = '';
    while (1) {
        my $n = sysread($status, $reason, 1024, length($reason));
        last if defined($n) ? $n == 0 : !$!{EINTR};
    }
    if (length($reason)) {
        waitpid($pid, 0);
        $self->{reaped} = 1;
        die $reason;
    }
    return $self;
}

sub _pipe {
    # Perl sets close-on-exec on both ends, because their numbers are above $^F.
    pipe(my $read, my $write) or die "Cannot start Node.js: no pipe, $!\n";
    return ($read, $write);
}

sub _exec_child {
    my ($node, $bridge, $in, $out, $err) = @_;

    for my $name (keys %SIG) {
        next if $name =~ m/^__/ || !defined($SIG{$name}) || $SIG{$name} eq '';
        $SIG{$name} = 'DEFAULT';
    }
    # A terminal's Ctrl-C goes to PVE alone, which cancels in order. This also protects Node from a kill of the whole
    # group.
    POSIX::setsid();
    POSIX::dup2(fileno($in), 0) // die "Cannot start Node.js: dup2 failed, $!\n";
    POSIX::dup2(fileno($out), 1) // die "Cannot start Node.js: dup2 failed, $!\n";
    POSIX::dup2(fileno($err), 2) // die "Cannot start Node.js: dup2 failed, $!\n";
    # Nothing in the caller's environment may change what Node runs or prints.
    delete @ENV{qw(IFS CDPATH ENV BASH_ENV), grep { m/^NODE_/ } keys %ENV};
    $ENV{PATH} = '/usr/sbin:/usr/bin:/sbin:/bin' if !defined($ENV{PATH}) || tainted($ENV{PATH});

    my $none = POSIX::SigSet->new();
    sigprocmask(SIG_SETMASK, $none);
    no warnings 'exec';
    # Node's advice to programmers is not a warning for the task log.
    exec { $node } $node, '--no-warnings', $bridge
        or die "Cannot start Node.js: $node: $!\n";
}

# Puts bytes in the queue; step() sends them.
sub send_message {
    my ($self, $message) = @_;

    $self->{to_send} .= PVE::BackupProvider::Bridge::Framing::encode_message($message);
    return;
}

# The next message that has arrived, or undef.
sub next_message {
    my ($self) = @_;

    return shift(@{ $self->{messages} });
}

# Why no further message will come, if Node sent something that is not a message.
sub problem {
    my ($self) = @_;

    return $self->{problem};
}

# Sends and receives what is possible, waiting up to $seconds. The caller's signal handlers run only during the wait,
# so a `die` in one of them never cuts a message in two and is never taken for an error of Node.
sub step {
    my ($self, $seconds) = @_;

    my $wait = $seconds < MAX_SELECT_SECONDS ? $seconds : MAX_SELECT_SECONDS;
    my ($readable, $writable) = ('', '');
    for my $handle (grep { defined } @$self{qw(out err)}) {
        vec($readable, fileno($handle), 1) = 1;
    }
    vec($writable, fileno($self->{in}), 1) = 1 if defined($self->{in}) && length($self->{to_send});

    my $ready = select($readable, $writable, undef, $wait);
    $self->_poll_exit() if $ready <= 0;
    return if $ready <= 0;

    local $SIG{PIPE} = 'IGNORE';
    my $lines = without_signals(sub { $self->_transfer($readable, $writable) });
    $self->{on_stderr}->($_) for @$lines;
    return;
}

# Sends and receives once what is possible without waiting; returns the lines of stderr.
sub _transfer {
    my ($self, $readable, $writable) = @_;

    my $lines = [];
    if (defined($self->{in}) && vec($writable, fileno($self->{in}), 1)) {
        $self->_send();
    }
    if (defined($self->{err}) && vec($readable, fileno($self->{err}), 1)) {
        $self->_receive('err', sub { $lines = $self->_stderr_lines($_[0]) });
    }
    if (defined($self->{out}) && vec($readable, fileno($self->{out}), 1)) {
        $self->_receive('out', sub { $self->_take_messages($_[0]) });
    }
    return $lines;
}

sub _send {
    my ($self) = @_;

    my $n = syswrite($self->{in}, $self->{to_send});
    if (defined($n)) {
        substr($self->{to_send}, 0, $n, '');
    } elsif (!$!{EAGAIN} && !$!{EINTR}) {
        # Node has closed its end: what it still says before it exits can be read.
        close(delete($self->{in}));
        $self->{to_send} = '';
    }
    return;
}

sub _receive {
    my ($self, $name, $use) = @_;

    my $n = sysread($self->{$name}, my $bytes, READ_BYTES);
    return $use->($bytes) if $n;
    return if !defined($n) && ($!{EAGAIN} || $!{EINTR});
    close(delete($self->{$name}));
    return;
}

sub _take_messages {
    my ($self, $bytes) = @_;

    return if defined($self->{problem});
    $self->{framing}->feed($bytes);
    eval {
        while (defined(my $message = $self->{framing}->next_message())) {
            push(@{ $self->{messages} }, $message);
        }
        1;
    } or chomp($self->{problem} = $@);
    return;
}

sub _stderr_lines {
    my ($self, $bytes) = @_;

    $self->{stderr} .= $bytes;
    my @lines;
    while ($self->{stderr} =~ s/^([^\n]*)\n//) {
        push(@lines, $1);
    }
    push(@lines, substr($self->{stderr}, 0, MAX_STDERR_LINE, ''))
        while length($self->{stderr}) > MAX_STDERR_LINE;
    @lines = grep { m/\S/ } map { substr($_, 0, MAX_STDERR_LINE) } @lines;
    $self->{last_stderr} = $lines[-1] if @lines;
    return \@lines;
}

# A child of Node may keep the pipes open after Node itself has exited.
sub _poll_exit {
    my ($self) = @_;

    return if $self->{reaped};
    my $pid = waitpid($self->{pid}, WNOHANG);
    return if $pid == 0;
    $self->{reaped} = 1;
    # -1: other code in this process has reaped it.
    $self->{exit_status} = $? if $pid == $self->{pid};
    return;
}

# True when no more messages can come.
sub is_gone {
    my ($self) = @_;

    return !defined($self->{out}) || $self->{reaped};
}

# After is_gone(): reads what is left and says how Node ended, e.g. "it exited with status 7 (last message)".
sub describe_end {
    my ($self) = @_;

    my $deadline = time() + $TERM_SECONDS;
    while (time() < $deadline) {
        $self->_poll_exit();
        my $is_last = $self->{reaped};
        last if $is_last && !defined($self->{err});
        $self->step(0.05);
        last if $is_last; # a child of Node keeps the pipe open
    }
    my $status = $self->{exit_status};
    my $how = 'it ended';
    if (defined($status)) {
        $how = _how_it_ended($status & 127, $status >> 8);
    } elsif (!$self->{reaped}) {
        $how = 'it closed the connection';
    }
    return length($self->{last_stderr}) ? "$how ($self->{last_stderr})" : $how;
}

sub _how_it_ended {
    my ($signal, $code) = @_;

    # When a signal asks Node to end, it cleans up and then exits with the status a shell would report for the signal.
    my $asked = $code > 128 ? $signal_name{$code - 128} : undef;
    return "it was asked to end by $asked" if !$signal && defined($asked);
    return "it exited with status $code" if !$signal;
    my $name = $signal_name{$signal} // "signal $signal";
    return "it was ended by $name" if $name ne 'SIGKILL';
    return "it was ended by $name, as the kernel does when memory runs out (journalctl -k tells)";
}

# Closes Node's input, gives it $seconds to exit, then kills it. Reaps it.
sub stop {
    my ($self, $seconds) = @_;

    return if $self->{owner} != $$;
    local ($?, $!, $@);
    close(delete($self->{in})) if defined($self->{in});
    $self->{to_send} = '';
    return if $self->_wait_exit($seconds);
    kill('TERM', $self->{pid});
    return if $self->_wait_exit($TERM_SECONDS);
    kill('KILL', $self->{pid});
    $self->_wait_exit($TERM_SECONDS);
    return;
}

sub _wait_exit {
    my ($self, $seconds) = @_;

    my $deadline = time() + $seconds;
    my $pause = 0.001;
    while (1) {
        $self->_poll_exit();
        return 1 if $self->{reaped};
        my $left = $deadline - time();
        return 0 if $left <= 0;
        $pause = $pause * 2 > 0.05 ? 0.05 : $pause * 2;
        $pause = $left if $pause > $left;
        # Keeps the pipes empty: Node cannot exit while it cannot write.
        $self->step($pause);
        $self->{messages} = [];
    }
}

1;
