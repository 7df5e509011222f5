"""From folders of results to tables, pictures and one page: plain functions over lm-eval's files, no lm_eval import.

load.py and answers.py read what schemas.py lets them believe; configuration.py is what a run records, rerun.py the
command that asks for it again; grouping.py makes runs the rows of cells.py, rows.py fills and compares them (../stats);
tables.py, plots/ and html.py write them, build.py does it all for a folder (command.py: `kv-lm-eval report`).
"""
