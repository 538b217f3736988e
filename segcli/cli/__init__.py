"""The command line: argument parsing, the console, one thin file per command."""
