"""The ``secura`` command and its subcommands."""
