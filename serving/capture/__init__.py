"""What models were asked and answered, kept as Parquet by `capture`, and scored again by `replay`."""
