"""The `sbd-engine` command: data on standard output, the rest on standard error."""
