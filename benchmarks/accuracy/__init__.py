"""Accuracy against speed on real tasks.

`python -m benchmarks.accuracy` trains a table (training.py, table.py, curve.py) and says what is left of it (plan.py).
`python -m benchmarks.accuracy.trials` tries settings. Rows are written by stored.py and read by results.py; the report
makes tables (tables.py) and plots (plots.py) of them.
"""
