#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# The scripted jobs of fixtures/pve make PVE's calls in PVE's order, also when something fails.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use JSON;
use Test::More;

BridgeTest::use_fake_bridge();
my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
PVE::Tools::file_set_contents("$dir/100.conf", "name: x\n");

# The script's output and its exit code; $more is what differs from the usual job file.
sub run_job {
    my ($more, $script, @args) = @_;

    my $job = {
        storeid => 'bk', 'log-dir' => $dir, notes => 'n', protected => 1, 'prune-backups' => { 'keep-last' => 1 },
        guests => [{
            vmid => 100, config => "$dir/100.conf", 'backup-time' => 1700000000,
            devices => { 'drive-scsi0' => { size => 1048576 } },
            volumes => { 'drive-scsi0' => { size => 1048576, 'bitmap-mode' => 'new', 'nbd-path' => '/x' } },
        }],
        %$more, scfg => { path => "$dir/bk" },
    };
    PVE::Tools::file_set_contents("$dir/job.json", encode_json($job));
    my @command = ($^X =~ m/^(.*)$/, '-T', "-I$BridgeTest::root/perl-shim", "-I$BridgeTest::root/fixtures/pve/lib");
    open(my $fh, '-|', @command, "$BridgeTest::root/fixtures/pve/$script", '--job', "$dir/job.json", @args) or die;
    local $/ = undef;
    my $output = <$fh>;
    close($fh);
    return ($output, $? >> 8);
}

# The provider's own log lines show which calls it got, in order.
sub calls {
    my ($output) = @_;

    return [$output =~ m/^INFO: (job_init|backup_vm|backup_cleanup \d+ \S+ \S+|log file|job_cleanup)/mg];
}

my @head = ('job_init', 'backup_vm');
my @tail = ('log file', 'job_cleanup');
my ($output, $code) = run_job({}, 'vzdump.pl');
is($code, 0, 'a job that works');
is_deeply(calls($output), [@head, 'backup_cleanup 100 qemu true', @tail], 'its calls');
like($output, qr/^INFO: creating Directory backup provider archive '100\/qemu-1700000000'$/m, 'its archive');
like($output, qr/^INFO: Finished Backup of VM 100 \(00:00:0\d\)$/m, 'its last line about the guest');

my $failed = 'backup_cleanup 100 qemu false';
my @cases = (
    ['before-backup-init' => ['job_init', 'backup_cleanup 100 undefined false', @tail]],
    ['after-backup-init' => ['job_init', $failed, @tail]],
    ['after-query' => ['job_init', $failed, @tail]],
    ['before-backup-vm' => ['job_init', $failed, @tail]],
    ['after-backup-vm' => [@head, $failed, @tail]],
    ['protected' => [@head, $failed, @tail]],
    ['prune' => [@head, $failed, @tail]],
    ['after-cleanup' => [@head, 'backup_cleanup 100 qemu true', $failed, @tail]],
);
for my $case (@cases) {
    my ($step, $expected) = @$case;
    my ($text, $rc) = run_job({}, 'vzdump.pl', '--fail-at', $step);
    is($rc, 1, "failing at $step ends with 1");
    is_deeply(calls($text), $expected, 'its calls');
    like($text, qr/^ERROR: Backup of VM 100 failed - .*failed on purpose at '$step'/m, 'its reason');
}
($output, $code) = run_job({}, 'vzdump.pl', '--fail-at', 'notes');
is($code, 0, 'notes that cannot be set only warn');
like($output, qr/^WARN: unable to add notes - failed on purpose/m, 'so they do');
($output, $code) = run_job({}, 'vzdump.pl', '--fail-at', 'before-job-cleanup');
is_deeply([$code, calls($output)->[-1]], [255, 'job_cleanup'], 'a job that fails is cleaned up');

($output, $code) = run_job({}, 'qmrestore.pl', '--archive', 'bk:backup/100/lxc-1', '--target', $dir);
is($code, 1, 'a container is no VM');
like($output, qr/mechanism 'tar' requested by backup provider is not supported for VMs/, 'the restore says so');
($output, $code) = run_job({}, 'pvesm.pl', 'list');
like($output, qr/^bk:backup\/100\/qemu-1700000000 +directory +backup +4096 100$/m, 'the list');

done_testing();
