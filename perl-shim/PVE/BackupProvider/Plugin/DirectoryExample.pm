# SPDX-License-Identifier: AGPL-3.0-or-later
# The directory provider, as PVE loads it.
package PVE::BackupProvider::Plugin::DirectoryExample;

use strict;
use warnings;

use base qw(PVE::BackupProvider::Bridge::Provider);

sub provider_name { return 'Directory backup provider' }

1;
