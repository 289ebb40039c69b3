"""Models for other servers, run in their own environments."""
