"""Command line: `ospq-export calibrate | export | validate | demo`, a module per command.

Heavy imports happen inside the commands, so that --help answers at once. Exit status: 0 done (validate: parity holds), 1 validate
found no parity, 2 the input was bad, 130 interrupted.
"""

from ospq_export.cli.app import main

__all__ = ["main"]
