"""From folders of results to tables, pictures and one page: plain functions over lm-eval's files, no lm_eval import.

load.py reads runs, rows.py makes them the rows and columns of a table, stats.py compares pairs of runs, tables.py,
plots.py and html.py write what rows.py holds, build.py does it all for a folder (`kv-lm-eval report`).
"""
