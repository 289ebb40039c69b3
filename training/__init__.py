"""The models that ship: `make train` fits, exports and publishes them."""
