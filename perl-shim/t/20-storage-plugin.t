#!/usr/bin/perl -T
# SPDX-License-Identifier: AGPL-3.0-or-later
# The storage plugin: names, options, the directory, listing, attributes, prune, and what it refuses.
use strict;
use warnings;

use lib 'perl-shim/t/lib';
use BridgeTest;

use File::Temp ();
use Scalar::Util qw(tainted);
use Test::More;

my $plugin = 'PVE::Storage::Custom::BackupProviderDirExamplePlugin';
BridgeTest::use_fake_bridge();
my ($dir) = File::Temp::tempdir(CLEANUP => 1) =~ m/^(.*)$/;
my $scfg = { type => $plugin->type(), path => "$dir/bk", content => { backup => 1 } };
my $point = 'backup/100/qemu-1700000000';

is($plugin->api(), 15, 'api() is the newest tested one');
{
    no warnings 'redefine';
    local *PVE::Storage::APIVER = sub { 13 };
    is($plugin->api(), 13, 'an older host gets its own version');
    local *PVE::Storage::APIVER = sub { 99 };
    is($plugin->api(), 15, 'a newer host gets the newest tested one');
}
is_deeply($plugin->plugindata()->{'sensitive-properties'}, {}, 'no sensitive properties, said so');
is_deeply([sort keys %{ $plugin->plugindata()->{content}->[0] }], ['backup'], 'content: backups only');

# Names
is_deeply(
    [$plugin->parse_volname($point)],
    ['backup', '100/qemu-1700000000', '100', undef, undef, undef, 'directory'], 'parse_volname',
);
for my $bad (
    'backup/../../etc/passwd', 'backup/', '100/vm-100-disk-0.raw', "$point\n", "backup/100/qemu-1 ", 'backup/./x',
    'backup//etc', 'backup/100/vm-1', 'backup/10/qemu-1', "backup/100/qemu-\x{661}", 'iso/x.iso', "$point/drive-scsi0.qcow2",
) {
    like(BridgeTest::failure(sub { $plugin->parse_volname($bad) }), qr/^Cannot use the volume name/, 'refuses ' . ($bad =~ s/[^ -~]/?/gr));
}
is($plugin->path($scfg, $point, 'bk'), "$dir/bk/100/qemu-1700000000", 'path is the folder');
is_deeply([$plugin->filesystem_path($scfg, $point)], ["$dir/bk/100/qemu-1700000000", '100', 'backup'], 'in list context');

# Options
my $check = sub { my (%section) = @_; return PVE::Storage::config_of('bk', { path => "$dir/bk", %section }) };
is($check->('vm-backup-mode' => 'incremental')->{ids}->{bk}->{'vm-backup-mode'}, 'incremental', 'an option is kept');
is($check->(path => '/a//b/')->{ids}->{bk}->{path}, '/a/b', 'the path is made canonical');
like(BridgeTest::failure(sub { $check->(path => '/a;b') }), qr/^Cannot use the path "\/a;b"/, 'a strange path is refused');
like(BridgeTest::failure(sub { $check->('vm-backup-mode' => 'x') }), qr/vm-backup-mode/, 'an unknown value is refused');
is($check->('dir-device-view' => 'nbd')->{ids}->{bk}->{'dir-device-view'}, 'nbd', 'dir-device-view is kept');
like(BridgeTest::failure(sub { $check->('dir-device-view' => 'nbdfuse') }), qr/dir-device-view/, 'and has three values');
is($check->('dir-full-read-every' => 0)->{ids}->{bk}->{'dir-full-read-every'}, 0, 'dir-full-read-every is kept');
is($check->('dir-verify-restore' => 0)->{ids}->{bk}->{'dir-verify-restore'}, 0, 'dir-verify-restore is kept');
is($check->('dir-nbd-timeout' => 60)->{ids}->{bk}->{'dir-nbd-timeout'}, 60, 'dir-nbd-timeout is kept');
for my $bad (4, 3601, 'long', '1.5', '') {
    like(BridgeTest::failure(sub { $check->('dir-nbd-timeout' => $bad) }), qr/dir-nbd-timeout/, "dir-nbd-timeout '$bad' is refused");
}
like(BridgeTest::failure(sub { $check->('nonsense' => 1) }), qr/nonsense/, 'an unknown option is refused');

# The directory
my $activate = sub { my (%more) = @_; return BridgeTest::failure(sub { $plugin->activate_storage('bk', { %$scfg, %more }, {}) }) };
is($plugin->status('bk', $scfg, {}), undef, 'status of a missing folder is undef');
like($activate->('create-base-path' => 0), qr/"\Q$dir\E\/bk" does not exist, and create-base-path is off$/, 'not created');
is($activate->(), '', 'activate_storage creates the folder');
is(sprintf('%o', (stat("$dir/bk"))[2] & 07777), '700', 'for root alone');
is($activate->(), '', 'and is content with it the next time');
like($activate->(path => "$dir/a/b"), qr/only the last part of the path is ever created$/, 'nothing above is created');
ok(!-e "$dir/a", 'really nothing');
mkdir("$dir/real") or die $!;
symlink('real', "$dir/link") or die $!;
is(
    $activate->(path => "$dir/link/bk"),
    "Cannot activate the storage \"bk\": cannot create \"$dir/link/bk\": \"$dir/link\" is a symbolic link: create the directory yourself\n",
    'nothing is created behind a link',
);
ok(!-e "$dir/real/bk", 'really nothing');
symlink('nowhere', "$dir/dangling") or die $!;
like($activate->(path => "$dir/dangling"), qr/"\Q$dir\E\/dangling" is a symbolic link: create the directory yourself$/, 'nor where a link has the name');
ok(!-e "$dir/nowhere", 'and what it leads to is not made');
mkdir("$dir/real/bk") or die $!;
is($activate->(path => "$dir/link/bk"), '', 'what is there may be behind a link of the administrator');
PVE::Tools::file_set_contents("$dir/a-file", '');
like($activate->(path => "$dir/a-file/bk"), qr/"\Q$dir\E\/a-file": Not a directory$/, 'nor below a file');
{
    # Which handles are synced, and what happens on a file system that cannot sync.
    my ($sync, @synced) = \&IO::Handle::sync;
    my $fails;
    no warnings 'redefine';
    local *IO::Handle::sync = sub { push(@synced, readlink("/proc/self/fd/" . fileno($_[0]))); $! = $fails if $fails; return $fails ? undef : $sync->(@_) };
    my $create = sub {
        my ($name) = @_;
        my ($result) = PVE::Tools::run_fork_with_timeout(5, sub { return [PVE::BackupProvider::Bridge::BackupFolder::create("$dir/$name"), @synced] });
        return $result;
    };
    is_deeply($create->('synced'), ['ok', $dir], 'the folder above a new one is synced');
    is_deeply($create->('synced'), ['ok', $dir], 'and above one that another process has just made');
    $fails = Errno::EINVAL();
    is($create->('no-sync')->[0], 'ok', 'a file system that syncs no folders will do');
    $fails = Errno::EIO();
    like($create->('sync-fails')->[0], qr/^the directory above it cannot be synced: /, 'an error of the disk is told');
}
like($activate->(path => "$dir/new", is_mountpoint => 'yes'), qr/"\Q$dir\E\/new" must be a mount point/, 'not mounted');
ok(!-e "$dir/new", 'nothing is created where nothing is mounted');
like($activate->(is_mountpoint => $dir), qr/"\Q$dir\E" must be a mount point/, 'another path that is not mounted');
is($activate->(is_mountpoint => '/proc'), '', 'another path that is mounted');
is($activate->(is_mountpoint => 'no'), '', 'is_mountpoint no');
is($plugin->status('bk', { %$scfg, is_mountpoint => 'yes' }, {}), undef, 'status of what is not mounted is undef');
my ($total, $avail, $used, $active) = $plugin->status('bk', $scfg, {});
ok($active && $total > 0 && $avail > 0 && $used >= 0, "status: $total, $avail, $used");
PVE::Tools::file_set_contents("$dir/file", '');
like($activate->(path => "$dir/file"), qr/"\Q$dir\E\/file" is not a directory$/, 'a file is not a directory');
{
    no warnings 'redefine';
    local *PVE::Tools::run_fork_with_timeout = sub { return (undef, 1) };
    like($activate->(), qr/did not answer within 2 seconds, is its server reachable\?$/, 'a hung server');
    is($plugin->status('bk', $scfg, {}), undef, 'status of a hung server is undef');
}
{
    local $ENV{PVE_BACKUP_HOST_NODE} = '/nonexistent/node';
    is($activate->(), '', 'activate_storage needs no Node');
    ok(($plugin->status('bk', $scfg, {}))[3], 'status needs no Node');
}

# What reads the store
my $list = $plugin->list_volumes('bk', $scfg, undef, ['images', 'backup']);
is_deeply(
    $list,
    [{
        volid => "bk:$point", content => 'backup', vmid => 100, subtype => 'qemu', ctime => 1700000000,
        size => 4096, format => 'directory', notes => "zwei\nZeilen \x{e4} \x{20ac}",
    }],
    'list_volumes',
);
ok(!(grep { tainted($_) } values %{ $list->[0] }), 'no value of an entry is tainted');
is_deeply($plugin->list_volumes('bk', $scfg, 999, ['backup']), [], 'of another guest: nothing');
is_deeply($plugin->list_volumes('bk', $scfg, undef, ['images']), [], 'other content: nothing');
is_deeply([$plugin->volume_size_info($scfg, 'bk', $point)], [4096, 'directory', 1024, undef], 'volume_size_info');
is_deeply(
    [$plugin->volume_size_info({ %$scfg, 'test-behaviour' => 'incremental' }, 'bk', $point)],
    [4096, 'directory', 1024, "${point}0"], 'and what an incremental one builds on',
);
is(scalar($plugin->volume_size_info($scfg, 'bk', $point)), 4096, 'in scalar context');
is($plugin->get_volume_attribute($scfg, 'bk', $point, 'protected'), 0, 'protected is 0, not undef');
is($plugin->get_volume_attribute($scfg, 'bk', $point, 'nosuch'), undef, 'an unknown attribute is undef');
is($plugin->get_volume_attribute($scfg, 'bk', $point, 'notes'), "zwei\nZeilen \x{e4} \x{20ac}", 'notes are characters');
is(BridgeTest::failure(sub { $plugin->update_volume_attribute($scfg, 'bk', $point, 'notes', "\x{20ac}") }), '', 'writing notes');
like(
    BridgeTest::failure(sub { $plugin->update_volume_attribute($scfg, 'bk', $point, 'nosuch', 1) }),
    qr/^Cannot set the attribute "nosuch": there is no such attribute$/, 'writing an unknown one dies',
);
like(
    BridgeTest::failure(sub { $plugin->free_image('bk', $scfg, $point, 0, 'directory') }),
    qr/^Cannot remove "\Q$point\E": this version does not remove backups$/, 'removing is forwarded',
);

# Prune
my $many = { %$scfg, 'test-entries' => 3 };
my $marks = sub { return [map { $_->{mark} } sort { $a->{ctime} <=> $b->{ctime} } @{ $_[0] }] };
my $dry = $plugin->prune_backups($many, 'bk', { 'keep-last' => 1 }, 100, 'qemu', 1, sub { });
is_deeply($marks->($dry), ['remove', 'remove', 'keep'], 'the dry run marks');
is_deeply(
    [sort keys %{ $dry->[0] }], ['ctime', 'mark', 'type', 'vmid', 'volid'], 'with the keys that PVE wants',
);
like(
    BridgeTest::failure(sub { $plugin->prune_backups($many, 'bk', { 'keep-last' => 1 }, 100, 'qemu', 0, sub { }) }),
    qr/^Cannot prune: refused on purpose$/, 'a real prune with something to remove dies',
);
is_deeply(
    $marks->($plugin->prune_backups($many, 'bk', { 'keep-last' => 3 }, 100, 'qemu', 0, sub { })),
    ['keep', 'keep', 'keep'], 'a real prune with nothing to remove succeeds',
);
is_deeply($plugin->prune_backups($many, 'bk', { 'keep-last' => 1 }, 100, 'lxc', 0, sub { }), [], 'of another type');
is_deeply(
    $marks->($plugin->prune_backups({ %$many, 'test-behaviour' => 'protected' }, 'bk', { 'keep-last' => 2 }, 100, 'qemu', 0, sub { })),
    ['protected', 'keep', 'keep'], 'a protected one is marked so and takes no slot',
);
ok(!(grep { tainted($_) } map { values(%$_) } @$dry), 'no value of an entry is tainted');
{
    my @told;
    local $SIG{__WARN__} = sub { push(@told, @_) };
    no warnings 'redefine';
    my $new = \&PVE::BackupProvider::Bridge::new;
    local *PVE::BackupProvider::Bridge::new = sub { my ($class, %param) = @_; return $new->($class, %param, log => sub { push(@told, $_[1]) }) };
    my $keep = { 'keep-all' => '0', map { ("keep-$_" => '1') } qw(last hourly daily weekly monthly yearly) };
    $plugin->prune_backups($many, 'bk', $keep, '100', 'qemu', 1, sub { });
    $plugin->prune_backups($many, 'bk', { 'keep-all' => 1, 'keep-last' => undef }, undef, undef, 1, sub { });
    is_deeply(
        \@told,
        [
            'prune_backups {"keep":{"all":false,"last":1,"hourly":1,"daily":1,"weekly":1,"monthly":1,"yearly":1},"vmid":100,"type":"qemu","dryrun":true}',
            'prune_backups {"keep":{"all":true,"last":0,"hourly":0,"daily":0,"weekly":0,"monthly":0,"yearly":0},"dryrun":true}',
        ],
        'every option arrives as a number, and what was not given as absent',
    );
}
is(
    BridgeTest::failure(sub { $plugin->prune_backups($many, 'bk', { 'keep-last' => 'x' }, 100, 'qemu', 1, sub { }) }),
    "Cannot use keep-last: \"x\" is not a number\n", 'a wrong option is refused',
);

# Refusals
for my $method (qw(
    alloc_image clone_image create_base volume_resize rename_volume volume_snapshot volume_snapshot_info
    volume_snapshot_rollback volume_rollback_is_possible volume_snapshot_delete volume_snapshot_needs_fsfreeze
    volume_qemu_snapshot_method rename_snapshot volume_export volume_import get_import_metadata qemu_blockdev_options
)) {
    like(BridgeTest::failure(sub { $plugin->$method() }), qr/^Cannot [^\n]+ holds backups only\n$/, "$method is refused");
}
my @with_snapname = (
    sub { $plugin->path($scfg, $point, 'bk', 'snap') },
    sub { $plugin->filesystem_path($scfg, $point, 'snap') },
    sub { $plugin->activate_volume('bk', $scfg, $point, 'snap', {}) },
    sub { $plugin->deactivate_volume('bk', $scfg, $point, 'snap', {}) },
);
like(BridgeTest::failure($_), qr/^Cannot use the snapshot "snap" of/, 'a snapshot name is refused') for @with_snapname;
like(
    BridgeTest::failure(sub { $plugin->activate_volume('bk', $scfg, $point, undef, {}) }),
    qr/^Cannot find the volume "bk:\Q$point\E"/, 'activating what is not there dies',
);
is($plugin->volume_has_feature($scfg, 'copy', 'bk', $point), 0, 'no feature');
is($plugin->storage_can_replicate($scfg, 'bk', 'raw'), 0, 'no replication');
is_deeply($plugin->list_images('bk', $scfg), [], 'no images');
is_deeply([$plugin->volume_export_formats($scfg, 'bk', $point)], [], 'no export formats');
is_deeply([$plugin->volume_import_formats($scfg, 'bk', $point)], [], 'no import formats');

done_testing();
