"""Published weights to ours: one importer per source."""
