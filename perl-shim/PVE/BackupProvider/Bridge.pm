# SPDX-License-Identifier: AGPL-3.0-or-later
# Calls methods of the Node side over JSON-RPC: starts Node when it is first needed, answers its reverse requests,
# cancels when the caller's signal handler dies, and ends Node when the object goes away.
package PVE::BackupProvider::Bridge;

use strict;
use warnings;

use JSON;
use Scalar::Util qw(weaken);
use Time::HiRes qw(time);

use PVE::BackupProvider::Bridge::NodeProgram;
use PVE::BackupProvider::Bridge::Process;
use PVE::BackupProvider::Bridge::Signals qw(without_signals);
use PVE::BackupProvider::Bridge::Values;

use constant PROTOCOL_VERSION => 3;

# Node limits its cleanup to 10 seconds; then it exits without finishing.
our $STOP_SECONDS = 15;
# A cancelled backup still has to end its child processes and remove what it wrote.
our $CANCEL_SECONDS = 30;

use constant RPC_METHOD_NOT_FOUND => -32601;
use constant RPC_HANDLER_FAILED => -32000;

my %live;

# The id of an internal message that answers whatever call is waiting; no peer can send it.
my $any_id = [];

# Keys: scfg, storeid, nodename, log (a function of level and message). Does not start Node.
sub new {
    my ($class, %param) = @_;

    my $self = bless({%param}, $class);
    $live{$self} = $self;
    weaken($live{$self});
    return $self;
}

# Calls $method and returns its result; dies with the reason if there is none, in one line, or as try_call() does.
sub call {
    my ($self, @request) = @_;

    local $SIG{__DIE__};
    my ($result, $problem) = $self->try_call(@request);
    die $problem if defined($problem);
    return $result;
}

# Calls $method: returns (its result), or (undef, the reason), which is Node's message or one about Node. $reverse:
# handlers by name for what Node may request meanwhile. $seconds: the time limit; without it, there is none. Dies only
# if it is interrupted, with the error that the caller's signal handler, or one of these handlers, died with.
sub try_call {
    my ($self, $method, $params, $reverse, $seconds) = @_;

    local $SIG{__DIE__};
    my $problem = $self->_is_running() ? undef : $self->_start();
    return (undef, $problem) if defined($problem);
    my $answer = $self->_request($method, $params, $reverse, $seconds);
    if ($answer->{error}) {
        if ($answer->{is_lost}) {
            $self->{process}->stop(0);
            delete($self->{process});
        }
        return (undef, PVE::BackupProvider::Bridge::Values::error_sentence($answer->{error}));
    }
    my $result = $answer->{result} // {};
    return ($result) if ref($result) eq 'HASH';
    return (undef, PVE::BackupProvider::Bridge::Values::unusable('it is not an object'));
}

# Ends Node in order. DESTROY and the end of the program call it, too.
sub close {
    my ($self) = @_;

    my $process = $self->{process} or return;
    if ($process->{owner} == $$) {
        local ($@, $!, $?);
        my $answer = eval {
            local $SIG{__DIE__};
            $process->is_gone() ? undef : $self->_request('shutdown', {}, undef, $STOP_SECONDS);
        };
        # A Node that answers with an error is ending already: hurrying it now would leave things behind.
        $process->stop($answer && !$answer->{is_lost} ? $STOP_SECONDS : 0);
    }
    delete($self->{process});
    return;
}

sub DESTROY {
    my ($self) = @_;

    delete($live{$self});
    return if ${^GLOBAL_PHASE} eq 'DESTRUCT';
    local ($@, $!, $?);
    eval { $self->close() };
    return;
}

END {
    local ($@, $!, $?);
    for my $self (grep { defined } values(%live)) {
        eval { $self->close() };
    }
}

# The Node that serves the calls of this object now; undef if there is none.
sub node_pid {
    my ($self) = @_;

    return $self->{process} ? $self->{process}->{pid} : undef;
}

# A fork copied the object, but Node remains the parent's: the child gets a separate Node.
sub _is_running {
    my ($self) = @_;

    my $process = $self->{process} or return 0;
    return 1 if $process->{owner} == $$ && !$process->is_gone();
    $process->stop(0);
    delete($self->{process});
    return 0;
}

# undef once Node serves this object, or the reason why it does not.
sub _start {
    my ($self) = @_;

    my $log = $self->{log};
    my $warn = sub { $log->('warn', PVE::BackupProvider::Bridge::Values::one_line($_[0])) };
    my $node;
    # Signals are held back, so a die in here is not an interruption.
    my $problem = without_signals(sub {
        my $is_started = eval {
            ($node, my $bridge) = PVE::BackupProvider::Bridge::NodeProgram::find();
            $self->{process} = PVE::BackupProvider::Bridge::Process->spawn($node, $bridge, $warn);
            1;
        };
        return $is_started ? undef : $@;
    });
    return $problem if defined($problem);
    my $is_answered = eval {
        $problem = $self->_initialize($node);
        1;
    };
    my $interruption = $@;
    return undef if $is_answered && !defined($problem);
    $self->{process}->stop(1) if $self->{process};
    delete($self->{process});
    die $interruption if !$is_answered;
    return $problem;
}

# undef, or the reason why this Node cannot be used.
sub _initialize {
    my ($self, $node) = @_;

    my $answer = $self->_request(
        'initialize',
        {
            'protocol-version' => int(PROTOCOL_VERSION), # int: a comparison as text leaves text behind
            storeid => "$self->{storeid}",
            type => "$self->{scfg}->{type}",
            scfg => PVE::BackupProvider::Bridge::Values::plain_data($self->{scfg}),
            nodename => "$self->{nodename}",
        },
    );
    if ($answer->{error}) {
        my $sentence = PVE::BackupProvider::Bridge::Values::error_sentence($answer->{error});
        my $too_old = $answer->{is_lost} ? PVE::BackupProvider::Bridge::NodeProgram::age_problem($node) : undef;
        return $too_old // $sentence;
    }
    my $result = ref($answer->{result}) eq 'HASH' ? $answer->{result} : {};
    my $theirs = PVE::BackupProvider::Bridge::Values::text_of($result->{'protocol-version'}) || 'unknown';
    return undef if $theirs eq PROTOCOL_VERSION;
    return "Cannot use the backup bridge: it speaks protocol version $theirs, this process "
        . "@{[PROTOCOL_VERSION]}; the package was upgraded meanwhile: start the job again, and restart"
        . " a daemon that says this\n";
}

# Sends one request and waits for its answer: { result } or { error }. With $seconds, waits no longer than that.
sub _request {
    my ($self, $method, $params, $reverse, $seconds) = @_;

    my $id = ++$self->{last_id};
    my $process = $self->{process};
    my $wait = { id => $id, method => $method, reverse => $reverse // {} };
    my $answer = eval {
        $process->send_message({ id => int($id), method => $method, params => $params });
        $self->_await($wait, $seconds);
    };
    my $interruption = $@;
    if (!defined($answer)) {
        $self->_cancel($wait);
        die $interruption;
    }
    return $answer;
}

# The caller was interrupted by a signal or an alarm. Node must have stopped working when this returns.
sub _cancel {
    my ($self, $wait) = @_;

    my $process = $self->{process};
    my $answer = eval {
        $process->send_message({ method => '$/cancelRequest', params => { id => int($wait->{id}) } });
        $self->_await({ %$wait, is_cancelled => 1 }, $CANCEL_SECONDS);
    };
    return if $answer && !$answer->{is_lost};
    eval { $process->stop(0) };
    delete($self->{process});
    return;
}

sub _await {
    my ($self, $wait, $seconds) = @_;

    my $process = $self->{process};
    my $deadline = defined($seconds) ? time() + $seconds : undef;
    while (1) {
        while (defined(my $message = _next_message($process))) {
            my $answer = $self->_handle($message, $wait);
            return $answer if $answer;
        }
        if ($process->is_gone()) {
            my $end = $process->describe_end();
            my $message = _next_message($process);
            my $answer = $message ? $self->_handle($message, $wait) : undef;
            return $answer if $answer;
            next if $message;
            return _lost("Cannot finish \"$wait->{method}\": the backup bridge is gone, $end");
        }
        my $left = defined($deadline) ? $deadline - time() : 60;
        return _lost("Cannot finish \"$wait->{method}\": the backup bridge does not answer") if $left <= 0;
        $process->step($left);
    }
}

# A peer that does not send messages can no longer be used.
sub _next_message {
    my ($process) = @_;

    my $message = $process->next_message();
    my $problem = $process->problem();
    return $message if defined($message) || !defined($problem);
    $process->stop(0);
    return { id => $any_id, error => { message => "Cannot talk to the backup bridge: $problem" } };
}

sub _lost {
    my ($sentence) = @_;

    return { is_lost => 1, error => { message => $sentence } };
}

# Handles one message; returns it if it is the answer that $wait is waiting for.
sub _handle {
    my ($self, $message, $wait) = @_;

    my ($id, $method) = @$message{qw(id method)};
    if (defined($method)) {
        return $self->_notified($message) if !defined($id);
        return $self->_reverse($message, $wait);
    }
    my $is_ours = ref($id) eq 'ARRAY' && $id == $any_id;
    return undef if !defined($id) || ($id ne $wait->{id} && !$is_ours); # late answer to a cancelled one
    return { error => $message->{error} } if defined($message->{error});
    return { result => $message->{result} };
}

sub _notified {
    my ($self, $message) = @_;

    my ($method, $params) = @$message{qw(method params)};
    return undef if $method ne 'log' || ref($params) ne 'HASH';
    my ($level) = ($params->{level} // '') =~ m/^(info|warn|err)$/;
    my $text = PVE::BackupProvider::Bridge::Values::text_of($params->{message});
    $self->{log}->($level // 'info', $text);
    return undef;
}

# A handler returns a result, or undef and the reason why it failed. If it dies, the waiting call ends with that
# error: it may come from the caller's signal handler, and it always says more than what Node would make of it.
sub _reverse {
    my ($self, $message, $wait) = @_;

    my ($id, $method, $params) = @$message{qw(id method params)};
    $params = {} if ref($params) ne 'HASH';
    my $reply = sub { $self->{process}->send_message({ id => $id, @_ }) };
    my $handler = $wait->{is_cancelled} ? undef : $wait->{reverse}->{$method};
    if (!$handler) {
        $reply->(error => { code => RPC_METHOD_NOT_FOUND, message => "there is no \"$method\" now" });
        return undef;
    }
    my ($result, $refusal) = eval { $handler->($params) };
    my $err = $@;
    if (defined(my $why = $err || $refusal)) {
        my $text = PVE::BackupProvider::Bridge::Values::line_for_json($why);
        $reply->(error => { code => RPC_HANDLER_FAILED, message => $text });
    } else {
        $reply->(result => $result);
    }
    die $err if $err;
    return undef;
}

1;
