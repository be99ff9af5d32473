# SPDX-License-Identifier: AGPL-3.0-or-later
# prune_backups for names that PVE's own code does not know. The marks are PVE's.
package PVE::BackupProvider::Bridge::Retention;

use strict;
use warnings;

# Marks the $backups of list_volumes by $keep and returns them as PVE wants them. Not a dry run: dies
# if there is something to remove, as this version removes nothing.
sub prune {
    my ($backups, $keep, $type, $dryrun) = @_;

    my $entries = [];
    my $groups = {};
    for my $backup (grep { !defined($type) || $_->{subtype} eq $type } @$backups) {
        my $entry = {
            ctime => $backup->{ctime},
            type => $backup->{subtype},
            vmid => $backup->{vmid},
            volid => $backup->{volid},
        };
        $entry->{mark} = 'protected' if $backup->{protected};
        push(@$entries, $entry);
        push(@{ $groups->{"$entry->{type}/$entry->{vmid}"} }, $entry);
    }
    PVE::Storage::prune_mark_backup_group($_, $keep) for values(%$groups);

    my $count = grep { $_->{mark} eq 'remove' } @$entries;
    die "Cannot prune backups: removing backups is not supported by this version, nothing was removed,"
        . " $count backup(s) stay beyond the retention; set prune-backups to keep-all=1 for this storage\n"
        if $count && !$dryrun;
    return $entries;
}

1;
