"""The subcommands of `prefixcore`. Each has `add_arguments(parser)` and `run(arguments) -> exit code`."""
