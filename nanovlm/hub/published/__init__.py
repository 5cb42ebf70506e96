"""Whole vision-language models as the hub publishes them: which they are, and how each is read.

`families.py` is the table, and has one short file for each family beside it.
"""
