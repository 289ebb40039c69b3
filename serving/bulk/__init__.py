"""Rows by the million: read in batches from CSV, NDJSON, Arrow or Parquet, and answers written the same way.

Needs the extra `serving[bulk]`. Only `formats` is imported without it.
"""
