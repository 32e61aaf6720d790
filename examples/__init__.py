"""Programs that use the autoencoder: python -m examples.NAME, from the repository's root."""
