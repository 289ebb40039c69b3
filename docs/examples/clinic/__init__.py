"""A clinic's service around two models: start your own from it."""
