"""`python -m ospq_export.cli`."""

from ospq_export.cli.app import main

main()
