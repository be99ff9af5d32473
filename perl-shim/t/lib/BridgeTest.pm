# SPDX-License-Identifier: AGPL-3.0-or-later
# For t/*.t: a provider object on the real bridge around the test double, and scripted peers.
package BridgeTest;

use strict;
use warnings;

BEGIN { $ENV{PATH} = '/usr/sbin:/usr/bin:/sbin:/bin' }

use Cwd ();
use File::Basename ();
use File::Temp ();
use JSON;

use PVE::Storage;
use PVE::Tools;

our ($root) = Cwd::abs_path(File::Basename::dirname(__FILE__) . '/../../..') =~ m/^(.*)$/;
our $fake_bridge = "$root/dist/test/fake-bridge.mjs";

# Other tests build the same file, perhaps at the same time: build under another name, then rename.
sub use_fake_bridge {
    my $made = "$fake_bridge.$$";
    system('node', "$root/scripts/build-fake-bridge.mjs", $made) == 0 or die "cannot build $fake_bridge\n";
    rename($made, $fake_bridge) or die "cannot rename to $fake_bridge: $!\n";
    $ENV{PVE_BACKUP_HOST_BRIDGE} = $fake_bridge;
    return;
}

# A test's Node script in place of the bridge. It has `reply(id, result)`, `send(message)`, `onMessage(handler)` and
# `hello`, the result of a valid `initialize`.
sub use_script {
    my ($code) = @_;

    my $file = File::Temp->new(TEMPLATE => 'peer-XXXXXX', TMPDIR => 1, SUFFIX => '.mjs');
    my $version = PVE::BackupProvider::Bridge::PROTOCOL_VERSION();
    print $file <<"END", $code;
const frame = (text) => `Content-Length: \${Buffer.byteLength(text)}\\r\\n\\r\\n\${text}`;
const raw = (bytes) => process.stdout.write(bytes);
const send = (message) => raw(frame(JSON.stringify({ jsonrpc: "2.0", ...message })));
const reply = (id, result) => send({ id, result });
const hello = { "protocol-version": $version, "node-version": "0" };
const welcome = (id) => reply(id, hello);
let input = Buffer.alloc(0);
const onMessage = (handler) => process.stdin.on("data", (bytes) => {
  input = Buffer.concat([input, bytes]);
  for (;;) {
    const end = input.indexOf("\\r\\n\\r\\n");
    if (end < 0) return;
    const length = Number(/: (\\d+)/.exec(input.subarray(0, end).toString())[1]);
    if (input.length < end + 4 + length) return;
    const body = input.subarray(end + 4, end + 4 + length).toString();
    input = input.subarray(end + 4 + length);
    handler(JSON.parse(body));
  }
});
process.stdin.on("end", () => process.exit(0));
END
    $file->flush();
    ($ENV{PVE_BACKUP_HOST_BRIDGE}) = $file->filename() =~ m/^(.*)$/;
    return $file;
}

# ($provider, \@log) for a storage section with these additions.
sub provider {
    my (%section) = @_;

    my $log = [];
    my $scfg = { type => PVE::Storage::TYPE(), path => '/nowhere', content => { backup => 1 }, %section };
    my $plugin = PVE::Storage::Plugin->lookup($scfg->{type});
    my $provider = $plugin->new_backup_provider($scfg, 'bk', sub { push(@$log, "$_[0]: $_[1]") });
    return ($provider, $log);
}

# The pid of the provider's Node; 0 while there is none.
sub node_pid {
    my ($provider) = @_;

    return ($provider->{bridge}->{process} // { pid => 0 })->{pid};
}

# True once the process is gone, within some seconds. Our zombie does not count as gone.
sub ends_within {
    my ($pid, $seconds) = @_;

    for (1 .. $seconds * 50) {
        return 1 if !kill(0, $pid);
        select(undef, undef, undef, 0.02);
    }
    return 0;
}

# What $code dies with; '' if it does not die.
sub failure {
    my ($code) = @_;

    eval { $code->(); 1 } and return '';
    return $@;
}

1;
