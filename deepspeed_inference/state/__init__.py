"""What sequences leave behind: contexts, snapshots at prefixes, sessions on disk."""
