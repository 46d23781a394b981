"""The report: its model, and what it is shown as."""
