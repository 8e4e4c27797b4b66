"""The ``hf-sai`` command: one file for each subcommand."""
