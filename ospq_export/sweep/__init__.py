"""Sweeps: a table of runs, models by recipes by overrides by seeds, planned in a TOML file and computed on Ray.

`plan.load_plan` reads and checks a plan, `driver.run_sweep` computes what its folder lacks and writes the tables. Sits above the
Python API, as the command line does.
"""
