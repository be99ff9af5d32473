#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# Every hook, through the real bridge: arguments arrive unchanged, results come back untainted.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use Scalar::Util qw(tainted);
use Test::More;

use PVE::BackupProvider::Plugin::Base;

BridgeTest::use_fake_bridge();
my ($provider, $log) = BridgeTest::provider();
my $raw = "name: \xff\0\n";

for my $method (@PVE::BackupProvider::Plugin::Base::METHODS) {
    my $own = PVE::BackupProvider::Plugin::DirectoryExample->can($method);
    isnt($own, PVE::BackupProvider::Plugin::Base->can($method), "$method is implemented");
}

is($provider->provider_name(), 'Directory backup provider', 'provider_name');
is(BridgeTest::node_pid($provider), 0, 'provider_name does not start Node');

is_deeply([$provider->job_init('1700000000')], [], 'job_init returns nothing');
my $pid = BridgeTest::node_pid($provider);
ok($pid, 'job_init starts Node');
is_deeply($provider->backup_init('100', 'qemu', 1700000123), { 'archive-name' => '100/qemu-1700000123' }, 'backup_init');
ok(!tainted($provider->backup_init(100, 'qemu', 1)->{'archive-name'}), 'the archive name is not tainted');
is($provider->backup_get_mechanism(100, 'qemu'), 'nbd', 'mechanism for VMs');
is($provider->backup_get_mechanism(100, 'lxc'), 'directory', 'mechanism for containers');

my $volumes = { 'drive-scsi0' => { size => '2000000' }, 'drive-scsi1' => { size => 4096 } };
is_deeply(
    $provider->backup_vm_query_incremental(100, $volumes),
    { 'drive-scsi0' => 'use', 'drive-scsi1' => 'new' },
    'backup_vm_query_incremental',
);
is_deeply([$provider->backup_vm_available_bitmaps(100, $volumes)], [], 'available_bitmaps returns nothing');
is($volumes->{'drive-scsi0'}->{'bitmap-name'}, 'bk', 'a usable base: the steady bitmap name');
like($volumes->{'drive-scsi1'}->{'bitmap-name'}, qr/^bk-\d+$/, 'no usable base: a name no bitmap has');

@$log = ();
my $access = {
    'drive-scsi0' => {
        size => '5000000000000',
        'bitmap-mode' => 'reuse',
        'bitmap-name' => 'snapshot-access:bk',
        'nbd-path' => '/run/qemu-server/100.backup-access.7//100-nbd.backup-access',
    },
};
is_deeply(
    [$provider->backup_vm(100, $raw, $access, { 'bandwidth-limit' => '1024', 'firewall-config' => $raw })],
    [], 'backup_vm returns nothing',
);
is(
    $log->[0],
    'info: backup_vm 6e616d653a20ff000a drive-scsi0:5000000000000:reuse:snapshot-access:bk:'
        . '/run/qemu-server/100.backup-access.7//100-nbd.backup-access',
    'the configuration arrives byte for byte, sizes as numbers',
);
is($log->[1], 'info: limit 1024 firewall [6e616d653a20ff000a]', 'limit and firewall configuration arrive');
$provider->backup_vm(100, $raw, $access, { 'firewall-config' => '' });
is($log->[3], 'info: limit 0 firewall []', 'an empty firewall configuration is not a missing one');

@$log = ();
is_deeply($provider->backup_cleanup(100, 'qemu', 1, {}), { stats => { 'archive-size' => 12345678901 } }, 'cleanup');
$provider->backup_cleanup(100, undef, 0, { error => "two\nlines\n" });
is_deeply(
    $log,
    ['info: backup_cleanup 100 qemu true undefined', 'info: backup_cleanup 100 undefined false two lines'],
    'cleanup after success and, without a type, after a failure',
);

is_deeply([$provider->restore_get_mechanism('backup/100/qemu-1')], ['qemu-img', 'qemu'], 'restore mechanism, list');
is_deeply([$provider->restore_get_mechanism('backup/100/lxc-1', 'bk')], ['tar', 'lxc'], 'with the extra storage id');
is($provider->archive_get_guest_config('backup/100/qemu-1'), $raw, 'guest configuration, byte for byte');
is($provider->archive_get_guest_config('backup/100/lxc-1', 'bk'), $raw, 'with the extra storage id');
is($provider->archive_get_firewall_config('backup/100/lxc-1', 'bk'), $raw, 'firewall configuration');
is($provider->archive_get_firewall_config('backup/100/qemu-1700000000'), undef, 'no firewall configuration');
my $devices = $provider->restore_vm_init('backup/100/qemu-1');
is_deeply($devices, { 'drive-scsi0' => { size => 17592186044416 } }, 'restore_vm_init');
ok(!tainted($devices->{'drive-scsi0'}->{size}), 'sizes are not tainted');
my $path = $provider->restore_vm_volume_init('backup/100/qemu-1', 'drive-scsi0', {})->{'qemu-img-path'};
is($path, '/run/fake/drive-scsi0.raw', 'restore_vm_volume_init');
ok(!tainted($path), 'the path is not tainted');
is_deeply([$provider->restore_vm_volume_cleanup('backup/100/qemu-1', 'drive-scsi0', {})], [], 'volume cleanup');
is_deeply([$provider->restore_vm_cleanup('backup/100/qemu-1')], [], 'restore_vm_cleanup');
is_deeply(
    $provider->restore_container_init('backup/100/lxc-1', 'bk', {}),
    { 'tar-path' => '/run/fake/archive.tar' }, 'restore_container_init',
);
is_deeply([$provider->restore_container_cleanup('backup/100/lxc-1', 'bk', {})], [], 'restore_container_cleanup');

is(
    BridgeTest::failure(sub { $provider->backup_init(100, 'openvz', 1700000000) }),
    "Cannot run \"backup_init\": vmtype is \"openvz\", expected one of \"qemu\", \"lxc\"\n",
    'an unknown guest type is refused in clear words',
);

@$log = ();
is_deeply([$provider->backup_handle_log_file(100, '/var/log/vzdump/qemu-100.log')], [], 'log file');
is_deeply($log, ['info: log file /var/log/vzdump/qemu-100.log'], 'the log file arrives');
$provider->job_cleanup();
$provider->job_cleanup();
is(BridgeTest::node_pid($provider), $pid, 'one Node served all calls');
undef($provider);
ok(!kill(0, $pid), 'Node has ended with the object');

my ($failing, $warnings) = BridgeTest::provider('test-behaviour' => 'log-file-fails');
is(BridgeTest::failure(sub { $failing->backup_handle_log_file(100, '/x') }), '', 'a failing log file never dies');
like($warnings->[-1], qr/^warn: cannot keep the log file: .*on purpose/, 'but it warns');

done_testing();
